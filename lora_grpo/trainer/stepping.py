"""The update of a GRPO step, and what a step measures on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lora_grpo.engines.delivery.canary import RESOLUTION, CanaryReport
from lora_grpo.grpo.advantages import reward_metrics
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.corrections import known_gaps
from lora_grpo.grpo.objective import filled
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.render import GAP
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.rewards import RewardFunction, reward_names
from lora_grpo.trainer.crew import Parts
from lora_grpo.trainer.rollouts import Rewarded
from lora_grpo.types import Group

OF_THE_VERSION = {"kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "frac_groups_used", GAP}
CANARY_ROWS = 32


class Clock:
    """Seconds by phase of one step, shown while they pass."""

    def __init__(self, reporter: Reporter) -> None:
        self.seconds: dict[str, float] = {}
        self._reporter = reporter

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._reporter.phase(phase)
        started = time.perf_counter()
        yield
        self.seconds[f"time/{phase}_s"] = time.perf_counter() - started


def learn(parts: Parts, config: GRPOConfig, rewarded: Rewarded, step: int) -> dict[str, Any]:
    """Check the completions' log-probs against the policy's, then update it. Raises `DeliveryError` before updating.

    Called by every process with all completions; each learns from its part of the rows.
    """
    processes = parts.policy.processes
    rows = Batch.from_groups(
        rewarded.groups, rewarded.advantages_B, mask_truncated_completions=config.mask_truncated_completions
    )
    checked: dict[str, Any] = {}

    def judge(prepared: Batch) -> None:
        checked[GAP] = gap = logprob_gap(prepared, processes)
        report = canary(parts, config, rewarded.groups, gap, step)
        if report is not None:
            checked.update({"canary/verdict": report.verdict, "canary/signal": report.signal})

    own = rows.select(torch.arange(len(rows))[processes.part(len(rows))])
    return {**parts.policy.update(own, judge=judge), **checked}


def canary(parts: Parts, config: GRPOConfig, groups: list[Group], gap: float, step: int) -> CanaryReport | None:
    """At the first step, at its cadence, and at once when the batch's own gap is above the noise.

    A batch of an earlier version than the trainer's is compared with that one's weights; its own gap says nothing.
    Raises `DeliveryError` when it fails.
    """
    number = groups[0].completions[0].version
    late = number is not None and number != parts.sync.head.number
    due = (step - 1) % config.canary_every == 0 or not (late or gap <= RESOLUTION * parts.sync.noise)
    # Noise is each process's own, to rounding, and a canary takes all of them.
    if parts.sync.probe is None or not parts.policy.processes.share(due):
        return None
    version = parts.sync.store.get(number) if late and number is not None else None
    return parts.sync.canary(
        spread(groups, CANARY_ROWS),
        version=version,
        temperature=config.temperature,
        batch_rows=config.per_device_train_batch_size,
    )


def spread(groups: list[Group], rows: int) -> list[Group]:
    """About `rows` completions of as many prompts as there are: prompts differ more than samples of one."""
    chosen = groups[:: max(1, len(groups) // rows)][:rows]
    each = max(1, rows // len(chosen))
    return [replace(group, completions=group.completions[:each]) for group in chosen]


def logprob_gap(batch: Batch, processes: Processes) -> float:
    """Mean |trainer - sampler| log-prob over the tokens in the loss, nats, of all processes' batches; NaN when the
    sampler gave none."""
    gaps_N = known_gaps(filled(batch.old_logp_BT), batch.sampler_logp_BT, batch.mask_BT)
    total, count = processes.sum(torch.stack([gaps_N.sum(), gaps_N.new_tensor(len(gaps_N))])).tolist()
    return total / count if count else math.nan


def step_metrics(rewarded: Rewarded, functions: Sequence[RewardFunction], config: GRPOConfig) -> dict[str, Any]:
    """What a step says of its rewards and completions, under TRL's names where it has them."""
    completions = [completion for group in rewarded.groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    names = reward_names(functions)
    return {
        **reward_metrics(
            rewarded.rewards_BF, names, config.num_generations, config.reward_weights, config.scale_rewards
        ),
        **rewarded.logged,
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(completion.truncated for completion in completions) / len(completions),
        "frac_groups_used": rewarded.used_groups(config.num_generations),
    }


def of_the_version(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of a step's metrics, those that say something about the version that made its completions."""
    return {name: value for name, value in metrics.items() if name.startswith("reward") or name in OF_THE_VERSION}


def sample_rows(rewarded: Rewarded, count: int = 4) -> list[dict[str, Any]]:
    """A few completions to look at, spread over the batch, with what reward functions logged beside each."""
    pairs = [(group.prompt, completion) for group in rewarded.groups for completion in group.completions]
    rows = [
        {"prompt": prompt, "completion": completion.text, "reward": value, "version": completion.version}
        for (prompt, completion), value in zip(pairs, rewarded.rewards_B.tolist(), strict=True)
    ]
    for column, values in rewarded.extra.items():
        for row, value in zip(rows, values, strict=True):
            row.setdefault(column, value)
    return rows[:: max(1, len(rows) // count)][:count]
