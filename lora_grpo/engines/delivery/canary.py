"""Do log-probs fit the version they are said to be of: a batch's, a load's, and the probe's at the start."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError, DeliveryError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Completion, Group, LogProbs

Verdict: TypeAlias = Literal["ok", "failed", "inconclusive"]
Row: TypeAlias = tuple[Sequence[int], Completion]
"""A prompt's token ids and one of its completions."""

CANARY_NOISE = 2.0
"""How many times the probe's noise a canary may find on its completions."""
RESOLUTION = 5.0
"""Differences within this many times the noise say nothing."""
AGREEMENT = 0.1
"""Share of the loud adapter's movement by which engine and trainer may differ; a scale wrong by 2 differs by half."""
NOISES = 2.0
"""How many times the noise under the loud adapter they may differ besides, up to as much as `AGREEMENT` again."""
MAX_BASE_NOISE_NATS = 0.2


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """Nats, means over completion tokens: `gap` trainer against sampler, `signal` the trainer's adapter against its
    base, `noise` engine against trainer on the base, over the same completions."""

    verdict: Verdict
    gap: float
    signal: float
    noise: float
    tokens: int

    def check(self, version: AdapterVersion) -> None:
        """Raises `DeliveryError` where the completions cannot be those of `version`."""
        if self.verdict == "failed":
            raise DeliveryError(f"{self}: the completions were not made by {version}")

    def __str__(self) -> str:
        said = f"canary {self.verdict}: trainer and sampler differ by {self.gap:.4f} nats per token, while the adapter "
        return f"{said}moves them by {self.signal:.4f} (noise {self.noise:.4f}, {self.tokens} tokens)"


def judge(gap: float, signal: float, noise: float) -> Verdict:
    """A sampler that ignores the adapter has gap = signal. So the gap fails when it is above the noise and half the
    signal; it passes when the signal is large enough to have shown that. Else it is inconclusive; NaN fails."""
    if math.isnan(gap + signal + noise) or gap > max(RESOLUTION * noise, 0.5 * signal):
        return "failed"
    return "ok" if signal > RESOLUTION * noise and gap <= 0.5 * signal else "inconclusive"


def compare(served: LogProbs, expected: LogProbs, others: Sequence[LogProbs], noise: float) -> CanaryReport:
    """Whether log-probs `served` are the `expected` ones and none of the `others`; raises `DeliveryError` when not. The
    signal is the distance to the nearest of the others: "ok" has told the version from each of them."""
    gap = mean_abs_difference(served, expected)
    signal = min((mean_abs_difference(expected, other) for other in others), default=0.0)
    report = CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, served)))
    if report.verdict == "failed":
        away = f"the nearest other version is {signal:.4f} away (noise {noise:.4f})"
        raise DeliveryError(f"log-probs are {gap:.4f} nats per token from the expected ones; {away}")
    return report


@dataclass(frozen=True)
class Witness:
    """What a trainer computes on fixed `sequences`, without an adapter (`base`) and with the loud one (`loud`), which
    moves the log-probs by `signal` nats per token; lists of log-probs of tokens 1..T-1. Rounding errors weigh `growth`
    times as much with the loud adapter as without."""

    sequences: list[list[int]]
    base: LogProbs
    loud: LogProbs
    signal: float
    growth: float = 1.0
    most_noise: float = MAX_BASE_NOISE_NATS

    def most_error(self, noise: float) -> float:
        """Nats by which an engine with the probe may differ, where its base differs by `noise`."""
        share = AGREEMENT * self.signal
        return share + min(NOISES * self.growth * noise, share)

    def error(self, served: LogProbs, noise: float) -> float:
        """Nats by which an engine with the probe differs from the trainer; raises `DeliveryError` for too many."""
        error, most = mean_abs_difference(served, self.loud), self.most_error(noise)
        if not error <= most:
            differ = f"log-probs differ by {error:.3g} nats where the adapter moves them by {self.signal:.3g}"
            limit = f"(at most {most:.3g}; base noise {noise:.3g})"
            raise DeliveryError(f"the engine does not apply the adapter as the trainer does: {differ} {limit}")
        return error


def base_noise(served: LogProbs, trainer: LogProbs, most: float) -> float:
    """Nats by which an engine's base differs from the trainer's; raises `UnsupportedAdapter` for another base."""
    noise = mean_abs_difference(served, trainer)
    if not noise <= most:
        said = f"the bases of engine and trainer differ by {noise:.3g} nats per token, but rounding explains {most:.3g}"
        fix = "load both from one checkpoint, in a dtype that it supports, without hooks or another attention"
        raise UnsupportedAdapter(f"{said} at most: {fix}")
    return noise


def rows_of(groups: Sequence[Group], version: AdapterVersion) -> list[Row]:
    """Raises `ConfigError` for a completion that is stamped with another version."""
    rows: list[Row] = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
    if stale := {completion.version for _, completion in rows} - {version.number}:
        raise ConfigError(f"completions of versions {stale} cannot be checked against {version}; pass its own")
    return rows


def take_canary(
    model: nn.Module,
    served_logprobs: Callable[..., LogProbs],
    rows: Sequence[Row],
    weights: AbstractContextManager[None],
    temperature: float,
    batch_rows: int,
    *,
    known_noise: float,
    most_noise: float,
) -> CanaryReport:
    """Completions' log-probs by the sampler against those by the trainer's policy and by its base. Inside `weights` the
    model is the policy that `rows` are stamped with; it computes `batch_rows` at a time. `known_noise` (nats, at
    `temperature`) stands in where the completions are too short to measure it by the engine's `served_logprobs`. Noise
    counts up to `most_noise` (nats, at temperature 1): a base that is another one must not widen its own limit. Raises
    `ConfigError` when no token of them was sampled, or greedily."""
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: greedy completions carry log-probs at 1; pass temperature=1")
    sampler = _sampled((completion.logprobs for _, completion in rows), rows)
    if not any(sampler):
        raise ConfigError("the groups hold no sampled token, so there is nothing to compare; pass completions")
    sequences = [[*prompt, *completion.token_ids] for prompt, completion in rows]
    scored: Any = {"starts": [len(prompt) for prompt, _ in rows], "rows": batch_rows}
    with weights:
        policy = _sampled(teacher_logprobs(model, sequences, temperature=temperature, **scored), rows)
    with peft_model_of(model).disable_adapter():
        whole = teacher_logprobs(model, sequences, temperature=temperature, **scored)
        own = whole if temperature == 1 else teacher_logprobs(model, sequences, **scored)
    # Without the last token, since the engine needs room for one more.
    own = [row[:-1] for row in own]
    served = served_logprobs([ids[:-1] for ids in sequences], adapter=None)
    served = [row[len(row) - len(mine) :] for row, mine in zip(served, own, strict=True)]
    measured = mean_abs_difference(served, own) / temperature if any(served) else known_noise
    noise = min(measured, most_noise / temperature)
    gap, signal = mean_abs_difference(policy, sampler), mean_abs_difference(policy, _sampled(whole, rows))
    return CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, sampler)))


def _sampled(logp: Iterable[Sequence[float]], rows: Sequence[Row]) -> list[list[float]]:
    """Of each row's log-probs, those of the completion's tokens that the policy sampled."""
    masks = [completion.token_mask or (True,) * len(completion.token_ids) for _, completion in rows]
    pairs = zip(logp, masks, strict=True)
    return [[value for value, own in zip(row[len(row) - len(mask) :], mask, strict=True) if own] for row, mask in pairs]
