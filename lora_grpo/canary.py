"""What the canary compares: completions' log-probs by the sampler, by the trainer's policy and by its base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from torch import nn

from lora_grpo.adapters.peft_format import peft_model_of
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.canary import CanaryReport, judge
from lora_grpo.errors import ConfigError
from lora_grpo.scoring import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Completion

Row: TypeAlias = tuple[Sequence[int], Completion]
"""A prompt's token ids and one of its completions."""


def take_canary(
    model: nn.Module,
    engine: Engine,
    rows: Sequence[Row],
    weights: AbstractContextManager[None],
    temperature: float,
    *,
    known_noise: float,
    most_noise: float,
) -> CanaryReport:
    """Measure gap, signal and noise on these completions, and judge them.

    Inside `weights` the model is the policy that `rows` are stamped with. `known_noise` (nats, at `temperature`) stands
    in where the completions are too short to measure it. Noise counts up to `most_noise` (nats, at temperature 1): a
    base that is another one must not widen its own limit. Raises `ConfigError` when no token of them was sampled.
    """
    sequences = [[*prompt, *completion.token_ids] for prompt, completion in rows]
    sampler = _sampled((completion.logprobs for _, completion in rows), rows)
    if not any(sampler):
        raise ConfigError("the groups hold no sampled token, so there is nothing to compare; pass completions")
    with weights:
        policy = _sampled(teacher_logprobs(model, sequences, temperature=temperature), rows)
    with peft_model_of(model).disable_adapter():
        base = _sampled(teacher_logprobs(model, sequences, temperature=temperature), rows)
    gap, signal = mean_abs_difference(policy, sampler), mean_abs_difference(policy, base)
    measured = _base_noise(model, engine, rows)
    noise = min(known_noise if measured is None else measured / temperature, most_noise / temperature)
    return CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, sampler)))


def _base_noise(model: nn.Module, engine: Engine, rows: Sequence[Row]) -> float | None:
    """Mean |engine - trainer| log-prob of the base on these completions: what they differ by with nothing to tell.

    The last token stays out, since the engine needs room for one more.
    """
    cut = [[*prompt, *completion.token_ids][:-1] for prompt, completion in rows]
    served = engine.logprobs(cut, adapter=None)
    with peft_model_of(model).disable_adapter():
        own = teacher_logprobs(model, cut)
    served, own = ([row[len(prompt) - 1 :] for row, (prompt, _) in zip(of, rows, strict=True)] for of in (served, own))
    return mean_abs_difference(served, own) if any(served) else None


def _sampled(logp: Iterable[Sequence[float]], rows: Sequence[Row]) -> list[list[float]]:
    """Of each row's log-probs, those of the completion's tokens that the policy sampled."""
    return [
        [value for value, own in zip(row[len(row) - len(mask) :], mask, strict=True) if own]
        for row, (_, completion) in zip(logp, rows, strict=True)
        for mask in [completion.token_mask or (True,) * len(completion.token_ids)]
    ]
