"""One GRPO step: generate from a named version, reward, update, publish; and what is measured on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.canary import RESOLUTION, CanaryReport
from lora_grpo.grpo.advantages import group_advantages, reward_metrics, weighted_rewards
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics import Reporter
from lora_grpo.rewards import Patience, RewardContext, RewardFunction, reward_names, score
from lora_grpo.rewards.call import TrainerState
from lora_grpo.sync import PushReceipt
from lora_grpo.trainer.assembly import Parts
from lora_grpo.trainer.rollouts import RolloutFunc, check_groups, training_sampling
from lora_grpo.types import Group, Prompt

GAP = "sampling/sampling_logp_difference/mean"
OF_THE_VERSION = {"kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "frac_groups_used", GAP}
CANARY_ROWS = 32


@dataclass(frozen=True)
class Rewarded:
    """A step's completions with what they earned: rewards_BF by function, rewards_B weighted, advantages_B."""

    groups: list[Group]
    rewards_BF: torch.Tensor
    rewards_B: torch.Tensor
    advantages_B: torch.Tensor
    logged: Mapping[str, float]

    def used_groups(self, num_generations: int) -> float:
        """Share of groups whose rewards differ, the only ones that carry signal."""
        return float((self.advantages_B != 0).view(-1, num_generations).any(1).float().mean())


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


def roll_out(
    parts: Parts,
    config: GRPOConfig,
    rollout_func: RolloutFunc | None,
    prompts: list[Prompt],
    version: AdapterVersion,
    *,
    step: int,
    rollbacks: int,
) -> list[Group]:
    """One group a prompt, all made by `version`; raises for anything else."""
    if rollout_func is None:
        sampling = training_sampling(config, step, rollbacks)
        groups = parts.rendering.generate(prompts, sampling, adapter=version)
    else:
        groups = rollout_func(prompts, parts.rendering, version)
    check_groups(groups, len(prompts), config, version)
    return groups


def reward(
    functions: Sequence[RewardFunction],
    groups: list[Group],
    columns: Mapping[str, Sequence[Any]],
    config: GRPOConfig,
    step: int,
) -> Rewarded:
    """Call the reward functions and compare within groups."""
    context = RewardContext(TrainerState(step, config.total_steps))
    values_BF = score(functions, groups, columns, context, patience(config))
    rewards_BF = torch.tensor(values_BF, dtype=torch.float64)
    rewards_B = weighted_rewards(rewards_BF, config.reward_weights)
    advantages_B = group_advantages(rewards_B, config.num_generations, config.scale_rewards)
    return Rewarded(groups, rewards_BF, rewards_B, advantages_B, context.metrics())


def patience(config: GRPOConfig) -> Patience:
    """How long reward functions are waited for."""
    return Patience(config.reward_retries, config.reward_timeout_s)


def learn(parts: Parts, config: GRPOConfig, rewarded: Rewarded, step: int) -> dict[str, Any]:
    """Check the completions' log-probs against the policy's, then update it. Raises `DeliveryError` before updating.

    Called by every process with all completions; each learns from its part of the rows.
    """
    processes = parts.policy.processes
    rows = Batch.from_groups(
        rewarded.groups,
        rewarded.advantages_B,
        mask_truncated_completions=config.mask_truncated_completions,
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
    if batch.old_logp_BT is None:
        raise ValueError("the batch was not prepared")
    known_BT = batch.mask_BT & ~batch.sampler_logp_BT.isnan()
    gaps_N = (batch.old_logp_BT - batch.sampler_logp_BT)[known_BT].abs()
    total, count = processes.sum(torch.stack([gaps_N.sum(), known_BT.sum().float()])).tolist()
    return total / count if count else math.nan


def step_metrics(
    rewarded: Rewarded, functions: Sequence[RewardFunction], config: GRPOConfig, receipt: PushReceipt | None
) -> dict[str, Any]:
    """What a step says of its rewards, completions and sync, under TRL's names where it has them."""
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
        **({f"sync/{phase}_s": seconds for phase, seconds in receipt.seconds.items()} if receipt else {}),
    }


def of_the_version(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of a step's metrics, those that say something about the version that made its completions."""
    return {name: value for name, value in metrics.items() if name.startswith("reward") or name in OF_THE_VERSION}


def sample_rows(rewarded: Rewarded, count: int = 4) -> list[dict[str, Any]]:
    """A few completions to look at, spread over the batch."""
    pairs = [(group.prompt, completion) for group in rewarded.groups for completion in group.completions]
    rows = [
        {"prompt": prompt, "completion": completion.text, "reward": value, "version": completion.version}
        for (prompt, completion), value in zip(pairs, rewarded.rewards_B.tolist(), strict=True)
    ]
    return rows[:: max(1, len(rows) // count)][:count]
