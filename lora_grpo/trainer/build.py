"""From a run's settings to its trainer, and back from a run directory to its engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_grpo.adapters.files.places import Identity
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog, state_extra
from lora_grpo.config import LoraSettings, ModelConfig, RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config, save_config
from lora_grpo.data import load_data
from lora_grpo.errors import ConfigError, counted
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.log import run_history
from lora_grpo.metrics.reporter import check_folder
from lora_grpo.rewards import RewardFunction, load_reward
from lora_grpo.trainer.assembly import launched, refuse_live
from lora_grpo.trainer.grpo_trainer import GRPOTrainer
from lora_grpo.trainer.guards import build_guard
from lora_grpo.trainer.preflight import MemberSpec
from lora_grpo.trainer.rollouts import saved_evaluations


def build_trainer(config: RunConfig, *, resume: bool = False, view: bool = True) -> GRPOTrainer:
    spec = spec_of(Processes(launched(config.grpo.ddp_timeout)).first(lambda: _checked(config, resume=resume)))
    return begin_run(config.model, spec, resume=resume, engine_config=config.engine, view=view)


def begin_run(model: ModelConfig, spec: MemberSpec, *, resume: bool, **others: Any) -> GRPOTrainer:
    """The trainer of `spec`. A file's settings are written to its run directory last, once nothing is refused."""
    trainer, settings = GRPOTrainer(model, **spec.arguments(), **others), spec.settings
    try:
        if resume:
            trainer.resume()
        if settings is not None:
            tokens = trainer.policy.config.max_tokens_per_micro_batch
            trainer.crew.processes.first(lambda: save_config(_cut_alike(settings, tokens), trainer.run_dir))
    except BaseException:
        trainer.close()
        raise
    return trainer


def nothing_left(config: RunConfig) -> tuple[str, dict[str, Any]] | None:
    """Why there is no work left for the run in `output_dir` (no step, rollback or evaluation), and how it ended."""
    run_dir, most = Path(config.output_dir), config.grpo.max_steps_without_signal
    check_place(run_dir)
    last = (run_history(run_dir) or [{}])[-1]
    if last.get("event") != "end" or Identity.read(run_dir) is None:
        return None
    with AdapterStore(archive=run_dir, readonly=True) as store:
        head = store.head
        idle = 0 if head is None else (state_extra(store, head.number) or {}).get("without_signal", 0)
    if head is None or RollbackLog(run_dir).waits_at(head.number):
        return None
    if config.data.eval is not None and head.number not in saved_evaluations(run_dir):
        return None
    if head.step >= config.grpo.total_steps:
        why = f"it has done its {counted(config.grpo.total_steps, 'step')}; raise grpo.total_steps to go on"
    elif most is not None and idle >= most:
        why = f"grpo.max_steps_without_signal={most} ended it at step {head.step}; raise it to go on"
    else:
        return None
    return f"{run_dir} has nothing left to train: {why}", last["info"]


def member_spec(config: RunConfig, *, resume: bool = False) -> MemberSpec:
    return spec_of(_checked(config, resume=resume))


def spec_of(config: RunConfig, rewards: Sequence[RewardFunction] = (), data: Sequence[Any] = ()) -> MemberSpec:
    """A run of a file; `rewards` and `data` where they are loaded already."""
    functions = rewards or [load_reward(reward) for reward in config.rewards]  # before the data, which may be far away
    train, held_out = data or load_data(config.data)
    return MemberSpec(
        config.output_dir,
        functions,
        effective_grpo(config),
        train,
        eval_dataset=held_out,
        peft_config=lora_config(config.lora),
        keep=config.keep,
        store_root=config.store_root,
        guard=build_guard(config.guard),
        settings=config,
    )


def check_place(run_dir: Path) -> bool:
    """Whether a run is in `run_dir`; a store without versions is none. Raises a `LoraGrpoError` where none can be."""
    check_folder(run_dir)
    refuse_live(run_dir)
    if Identity.read(run_dir) is None:
        return (run_dir / RESOLVED_FILE).exists()
    with AdapterStore(archive=run_dir, readonly=True) as store:
        return bool(store.numbers)


def _checked(config: RunConfig, *, resume: bool) -> RunConfig:
    """Refuses what the run directory rules out, and changes nothing there. A run that goes on has micro-batches of as
    many tokens as before, on which its bits depend."""
    run_dir = Path(config.output_dir)
    if (holds_run := check_place(run_dir)) and not resume:
        raise ConfigError(f"{run_dir} holds a run already; go on with --resume, or name another output_dir")
    if not resume or not (run_dir / RESOLVED_FILE).is_file():
        return config
    before = load_config(run_dir)
    if holds_run:
        check_same_adapter(before.lora, config.lora, run_dir)
    return _cut_alike(config, config.grpo.max_tokens_per_micro_batch or before.grpo.max_tokens_per_micro_batch)


def _cut_alike(config: RunConfig, tokens: int | None) -> RunConfig:
    return config.replace(grpo=config.grpo.replace(max_tokens_per_micro_batch=tokens))


def check_same_adapter(before: LoraSettings, now: LoraSettings, run_dir: Path) -> None:
    for name in type(now).model_fields:
        old, new = getattr(before, name), getattr(now, name)
        if old != new and name != "lora_dropout":
            told = f"lora.{name}={new!r}: the versions of {run_dir} were trained with {old!r}"
            raise ConfigError(f"{told}; leave it as it was, or begin another run")


def effective_grpo(config: RunConfig) -> GRPOConfig:
    return config.grpo.replace(reward_weights=tuple(reward.weight for reward in config.rewards))


def lora_config(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(**settings.model_dump(mode="json"), task_type="CAUSAL_LM")
