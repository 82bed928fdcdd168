"""What a member of a population is: the settings and functions of a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig, RunConfig
from lora_grpo.data import PromptDataset, Rows
from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.rewards import RewardFunction
from lora_grpo.trainer.guards import Guard
from lora_grpo.trainer.population.room import Wanted
from lora_grpo.trainer.preflight import Preflight, prompts_of, reward_functions
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
        """With its data read."""
        held_out = self.eval_dataset
        return replace(
            self,
            train_dataset=prompts_of(self.train_dataset, "train_dataset"),
            eval_dataset=None if held_out is None else prompts_of(held_out, "eval_dataset"),
        )

    def checked(self, model: ModelConfig, engine_config: EngineConfig) -> Wanted:
        """What a member whose data are `loaded` needs, once all is checked that can be before an engine starts.

        Raises `ConfigError`.
        """
        if self.config.max_staleness:
            raise ConfigError(
                f"{self.run_dir}: max_staleness={self.config.max_staleness} samples ahead of its turn, and a "
                "population samples for all its members at once; set max_staleness=0"
            )
        before = Preflight(
            model,
            reward_functions(self.reward_funcs),
            self.config,
            cast(PromptDataset, self.train_dataset),
            cast(PromptDataset | None, self.eval_dataset),
            self.processing_class,
            None,
            engine_config,
            self.guard,
        )
        before.check()
        config = self.config
        return Wanted(self.peft_config, before.largest_batch, config.gradient_checkpointing, config.rows_per_step(1))
