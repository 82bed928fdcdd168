"""What the canary compares: completions' log-probs by the sampler, by the trainer's policy and by its base."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import nn

from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.canary import CanaryReport, judge
from lora_grpo.errors import ConfigError
from lora_grpo.scoring import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Completion, Group, LogProbs, Sequences

CANARY_NOISE = 2.0
"""How many times the probe's noise a canary may find on its completions."""

Row: TypeAlias = tuple[Sequence[int], Completion]
"""A prompt's token ids and one of its completions."""


def rows_of(groups: Sequence[Group], version: AdapterVersion) -> list[Row]:
    """Raises `ConfigError` for a completion that is stamped with another version."""
    rows: list[Row] = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
    if stale := {completion.version for _, completion in rows} - {version.number}:
        raise ConfigError(f"completions of versions {stale} cannot be checked against {version}; pass its own")
    return rows


def take_canary(
    model: nn.Module,
    engine: Engine,
    rows: Sequence[Row],
    weights: AbstractContextManager[None],
    temperature: float,
    *,
    batch_rows: int,
    known_noise: float,
    most_noise: float,
) -> CanaryReport:
    """Inside `weights` the model is the policy that `rows` are stamped with; it computes `batch_rows` at a time.
    `known_noise` (nats, at `temperature`) stands in where the completions are too short to measure it. Noise counts up
    to `most_noise` (nats, at temperature 1): a base that is another one must not widen its own limit. Raises
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
    base = _sampled(whole, rows)
    gap, signal = mean_abs_difference(policy, sampler), mean_abs_difference(policy, base)
    measured = _base_noise(engine, sequences, own)
    noise = min(known_noise if measured is None else measured / temperature, most_noise / temperature)
    return CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, sampler)))


def _base_noise(engine: Engine, sequences: Sequences, own: LogProbs) -> float | None:
    """Mean |engine - trainer| log-prob of the base, of which the trainer's `own` are those of each completion. The last
    token stays out, since the engine needs room for one more."""
    own = [row[:-1] for row in own]
    served = engine.logprobs([ids[:-1] for ids in sequences], adapter=None)
    served = [row[len(row) - len(mine) :] for row, mine in zip(served, own, strict=True)]
    return mean_abs_difference(served, own) if any(served) else None


def _sampled(logp: Iterable[Sequence[float]], rows: Sequence[Row]) -> list[list[float]]:
    """Of each row's log-probs, those of the completion's tokens that the policy sampled."""
    return [
        [value for value, own in zip(row[len(row) - len(mask) :], mask, strict=True) if own]
        for row, (_, completion) in zip(logp, rows, strict=True)
        for mask in [completion.token_mask or (True,) * len(completion.token_ids)]
    ]
