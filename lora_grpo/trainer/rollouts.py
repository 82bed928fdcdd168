"""A step's completions: sampled from one named version, with seeds that no other step or rollback repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError, DeliveryError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.types import Group, Prompt, Sampling, derive_seed

RolloutFunc: TypeAlias = Callable[[Sequence[Prompt], Engine, AdapterVersion], list[Group]]
"""`f(prompts, engine, version)` -> one group a prompt; `Completion.token_mask` marks the tokens the policy sampled.

The engine renders text and chats as the trainer does; `prompt + [message]` keeps a chat's `chat_template_kwargs`."""


def training_sampling(config: GRPOConfig, step: int, rollbacks: int) -> Sampling:
    """How step `step` samples; a rollback changes every seed, so that the same collapse is not replayed."""
    return Sampling(
        n=config.num_generations,
        max_tokens=config.max_completion_length,
        temperature=config.temperature,
        seed=derive_seed(config.seed, step, rollbacks),
    )


def greedy_sampling(config: GRPOConfig) -> Sampling:
    """How held-out prompts are answered: one greedy completion each."""
    return Sampling(n=1, max_tokens=config.max_completion_length, temperature=0.0, seed=config.seed)


def check_groups(groups: Sequence[Group], prompts: int, config: GRPOConfig, version: AdapterVersion) -> None:
    """Raises for groups that cannot be trained on: a missing one, an odd size, or completions of another version."""
    sizes = {len(group.completions) for group in groups}
    if len(groups) != prompts or sizes != {config.num_generations}:
        raise ConfigError(
            f"the rollout gave {len(groups)} groups of sizes {sorted(sizes)}; it must give {prompts} groups of "
            f"num_generations={config.num_generations}"
        )
    for index, group in enumerate(groups):
        strangers = {completion.version for completion in group.completions} - {version.number}
        if strangers:
            raise DeliveryError(
                f"prompt {index} was completed by version {sorted(map(str, strangers))}, not by {version}; pass "
                "adapter=version to engine.generate"
            )
        if any(not completion.token_ids for completion in group.completions):
            raise DeliveryError(f"prompt {index} has a completion without tokens")
