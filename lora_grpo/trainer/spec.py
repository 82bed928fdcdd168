"""What a run is made of, less the model and the engine: its settings, functions and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_grpo.config import KeepConfig, RunConfig
from lora_grpo.data import PromptDataset, Rows, load_prompts
from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.rewards import RewardFunction
from lora_grpo.trainer.guards import Guard
from lora_grpo.trainer.rollouts import RolloutFunc


@dataclass(frozen=True)
class MemberSpec:
    """What `GRPOTrainer` takes for a run, less the model and the engine, which the population has.

    `settings`, where the member comes from a file, are written to the run directory when it starts.

    >>> MemberSpec("runs/lr-1e-5", reward, GRPOConfig(learning_rate=1e-5), rows, peft_config=lora).name
    'lr-1e-5'
    """

    run_dir: str | Path
    reward_funcs: RewardFunction | Sequence[RewardFunction]
    config: GRPOConfig
    train_dataset: Rows | PromptDataset | str | Path
    _: KW_ONLY
    peft_config: Any
    eval_dataset: Rows | PromptDataset | str | Path | None = None
    processing_class: Any = None
    keep: KeepConfig | None = None
    store_root: str | Path | None = None
    rollout_func: RolloutFunc | None = None
    guard: Guard | None = None
    settings: RunConfig | None = None

    def arguments(self) -> dict[str, Any]:
        """What a `GRPOTrainer` of this run is built with, on a model and an engine."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}

    @property
    def name(self) -> str:
        """What its directory is called."""
        return Path(self.run_dir).name

    def loaded(self) -> MemberSpec:
        """With its data read, whose chats are rendered as its settings say."""

        def read(data: Any, name: str) -> PromptDataset:
            return replace(prompts_of(data, name), chat_template_kwargs=self.config.chat_template_kwargs)

        held_out = None if self.eval_dataset is None else read(self.eval_dataset, "eval_dataset")
        return replace(self, train_dataset=read(self.train_dataset, "train_dataset"), eval_dataset=held_out)


def prompts_of(data: Any, name: str) -> PromptDataset:
    """The prompts that a trainer was given. Raises `ConfigError` where they are missing or none."""
    if data is None:
        raise ConfigError(f"{name} is missing: pass a datasets.Dataset, a list of dicts with 'prompt', or a file")
    return data if isinstance(data, PromptDataset) else load_prompts(data)
