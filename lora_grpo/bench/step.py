"""A whole GRPO step: generate, train, sync."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.bench.gauges import Clock
from lora_grpo.bench.plan import Cell, Settings, Subject, beside_native, results
from lora_grpo.bench.schema import StepRow
from lora_grpo.grpo.advantages import group_advantages
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.types import Sampling

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy

SERVING = ("generate", "sync")
"""The phases in which strategies differ."""
PHASES = (*SERVING, "train")


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    how: dict[str, Any] = {
        "arguments": {"settings": settings},
        "warm": {"settings": settings.replace(repeat=1)},
        "labels": {
            "rows": settings.step_rows,
            "prompt_tokens": settings.prompt_tokens,
            "completion_tokens": settings.step_tokens,
        },
    }
    return [beside_native("step", measure, subject, name, **how) for name in settings.others]


def measure(strategy: Strategy, settings: Settings) -> dict[str, list[float]]:
    """Worker: steps on random prompts, with advantages drawn at random; seconds by phase."""
    from lora_grpo.policy import Policy

    prompts = settings.step_rows // settings.group
    config = GRPOConfig(
        num_generations=settings.group,
        per_device_train_batch_size=settings.group,
        gradient_accumulation_steps=prompts,
        max_completion_length=settings.step_tokens,
        total_steps=settings.each_way,
        # Two trainers and two engines share one GPU.
        gradient_checkpointing=strategy.subject.device != "cpu",
    )
    policy = Policy(strategy.trainer.model, config)
    done = [_step(strategy, policy, prompts, settings.prompt_tokens) for _ in range(settings.each_way)]
    return {phase: [seconds[phase] for seconds in done] for phase in PHASES}


def _step(strategy: Strategy, policy: Any, prompts: int, prompt_tokens: int) -> dict[str, float]:
    config, clock = policy.config, Clock(strategy.subject.device)
    drawn = strategy.subject.fresh_prompts(prompts, prompt_tokens)
    sampling = Sampling(n=config.num_generations, max_tokens=config.max_completion_length, seed=0, ignore_eos=True)
    with clock("generate"):
        groups = strategy.generate(drawn, sampling)
    with clock("train"):
        rewards_B = torch.rand(prompts * config.num_generations)
        advantages_B = group_advantages(rewards_B, config.num_generations, config.scale_rewards)
        batch = policy.prepare(Batch.from_groups(groups, advantages_B))
        policy.update(batch)
    with clock("sync"):
        strategy.sync()
    return clock.seconds


def rows(cell: Mapping[str, Any]) -> list[StepRow]:
    """Both strategies of a pair. Training is the same work whatever syncs: both are given the median of all its rounds,
    so that its noise, which is more than what they differ in, favours neither."""
    train_s = median(s for done in cell["rounds"] for s in done["result"]["train"])
    parts = {strategy: {phase: median(found[phase]) for phase in SERVING} for strategy, found in results(cell).items()}
    native_s = sum(next(iter(parts.values())).values())
    return [
        StepRow(
            strategy=strategy,
            **cell["labels"],
            **{f"{phase}_s": seconds for phase, seconds in serving.items()},
            train_s=train_s,
            step_s=(serving_s := sum(serving.values())) + train_s,
            ratio_to_native=(serving_s + train_s) / (native_s + train_s),
            serving_ratio_to_native=serving_s / native_s,
        )
        for strategy, serving in parts.items()
    ]
