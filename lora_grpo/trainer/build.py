"""From a run's settings to its trainer, and back from a run directory to its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_grpo.adapters.files.layout import Identity
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import LoraSettings, RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config, save_config
from lora_grpo.data import load_data
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics import check_folder
from lora_grpo.rewards import load_reward
from lora_grpo.trainer.assembly import refuse_live
from lora_grpo.trainer.crew import launched
from lora_grpo.trainer.grpo_trainer import GRPOTrainer
from lora_grpo.trainer.guards import build_guard
from lora_grpo.trainer.population.spec import MemberSpec


def build_trainer(config: RunConfig, *, resume: bool = False, view: bool = True) -> GRPOTrainer:
    """The trainer of a run. Its resolved settings are written to the run directory last, once nothing is refused."""
    run_dir = Path(config.output_dir)
    processes = Processes(launched(config.grpo.ddp_timeout))
    processes.first(lambda: _check_run(config, run_dir, resume=resume))
    if resume and config.grpo.max_tokens_per_micro_batch is None:
        config = _cut_alike(config, processes.first(lambda: _kept_cut(run_dir)))
    spec = _spec(config)
    trainer = GRPOTrainer(config.model, **spec.arguments(), engine_config=config.engine, view=view)
    try:
        if resume:
            trainer.resume()
        trainer.crew.processes.first(lambda: keep_settings(config, trainer))
    except BaseException:
        trainer.close()
        raise
    return trainer


def member_spec(config: RunConfig, *, resume: bool = False) -> MemberSpec:
    """A run of a file as a member of a population, which has the file's model and engine."""
    run_dir = Path(config.output_dir)
    _check_run(config, run_dir, resume=resume)
    if resume and config.grpo.max_tokens_per_micro_batch is None:
        config = _cut_alike(config, _kept_cut(run_dir))
    return _spec(config)


def _spec(config: RunConfig) -> MemberSpec:
    train, held_out = load_data(config.data)
    return MemberSpec(
        config.output_dir,
        [load_reward(reward) for reward in config.rewards],
        effective_grpo(config),
        train,
        eval_dataset=held_out,
        peft_config=lora_config(config.lora),
        keep=config.keep,
        store_root=config.store_root,
        guard=build_guard(config.guard),
        settings=config,
    )


def keep_settings(config: RunConfig, trainer: GRPOTrainer) -> None:
    """Write a run's resolved settings into its directory."""
    save_config(_cut_alike(config, trainer.policy.config.max_tokens_per_micro_batch), trainer.run_dir)


def check_place(run_dir: Path) -> str:
    """Whether a run can be in `run_dir`, and whether one is; raises a `LoraGrpoError` for a file or a live run."""
    check_folder(run_dir)
    refuse_live(run_dir)
    return f"{run_dir} holds a run, which goes on with --resume" if _holds_run(run_dir) else f"{run_dir} holds no run"


def _check_run(config: RunConfig, run_dir: Path, *, resume: bool) -> None:
    """Refuse what the run directory rules out, and change nothing there."""
    check_place(run_dir)
    if not resume and _holds_run(run_dir):
        raise ConfigError(f"{run_dir} holds a run already; go on with --resume, or name another output_dir")
    if resume and (run_dir / RESOLVED_FILE).is_file() and _holds_run(run_dir):
        check_same_adapter(load_config(run_dir).lora, config.lora, run_dir)


def _kept_cut(run_dir: Path) -> int | None:
    """Into micro-batches of how many tokens a run's batches are cut, which its bits depend on."""
    kept = (run_dir / RESOLVED_FILE).is_file()
    return load_config(run_dir).grpo.max_tokens_per_micro_batch if kept else None


def _cut_alike(config: RunConfig, tokens: int | None) -> RunConfig:
    cut: RunConfig = config.replace(grpo=config.grpo.replace(max_tokens_per_micro_batch=tokens))
    return cut


def _holds_run(run_dir: Path) -> bool:
    """Whether anything was published there; a start that failed before leaves a store without versions."""
    if Identity.read(run_dir) is None:
        return (run_dir / RESOLVED_FILE).exists()
    with AdapterStore(archive=run_dir, readonly=True) as store:
        return bool(store.numbers)


def check_same_adapter(before: LoraSettings, now: LoraSettings, run_dir: Path) -> None:
    """Raises `ConfigError` for an adapter of another form than that of the run's versions."""
    for name in type(now).model_fields:
        old, new = getattr(before, name), getattr(now, name)
        if old != new and name != "lora_dropout":
            raise ConfigError(
                f"lora.{name}={new!r}: the versions of {run_dir} were trained with {old!r}, and a run keeps its "
                "adapter's form; leave the setting as it was, or begin another run"
            )


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
