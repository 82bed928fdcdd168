"""From a run's settings to its trainer, and back from a run directory to its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_grpo.config import GRPOConfig, LoraSettings, RunConfig
from lora_grpo.config_file import RESOLVED_FILE, save_config
from lora_grpo.data import load_data
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.processes import Processes
from lora_grpo.rewards import load_reward
from lora_grpo.trainer.assembly import refuse_live
from lora_grpo.trainer.crew import launched
from lora_grpo.trainer.grpo_trainer import GRPOTrainer
from lora_grpo.trainer.guards import build_guard


def build_trainer(config: RunConfig, *, resume: bool = False, view: bool = True) -> GRPOTrainer:
    """The trainer of a run; its resolved settings are written to the run directory first."""
    Processes(launched(config.grpo.ddp_timeout)).first(lambda: _settle(config, Path(config.output_dir), resume=resume))
    train, held_out = load_data(config.data)
    trainer = GRPOTrainer(
        config.model,
        [load_reward(reward) for reward in config.rewards],
        effective_grpo(config),
        train,
        eval_dataset=held_out,
        peft_config=lora_config(config.lora),
        engine_config=config.engine,
        keep=config.keep,
        run_dir=config.output_dir,
        store_root=config.store_root,
        guard=build_guard(config.guard),
        view=view,
    )
    if resume:
        trainer.resume()
    return trainer


def _settle(config: RunConfig, run_dir: Path, *, resume: bool) -> None:
    if not resume and (run_dir / RESOLVED_FILE).exists():
        raise ConfigError(f"{run_dir} holds a run already; go on with --resume, or name another output_dir")
    refuse_live(run_dir)
    save_config(config, run_dir)


def effective_grpo(config: RunConfig) -> GRPOConfig:
    """The algorithm's settings with the rewards' own weights."""
    return config.grpo.replace(reward_weights=tuple(reward.weight for reward in config.rewards))


def lora_config(settings: LoraSettings) -> LoraConfig:
    """`peft.LoraConfig` of a run's settings."""
    targets: Any = settings.target_modules
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        task_type="CAUSAL_LM",
    )
