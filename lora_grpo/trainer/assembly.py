"""Puts a trainer's parts together: engine, PEFT model, store, sync, policy, prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_grpo.adapters.files.locks import holder
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.keeping import keeps_state, retention
from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.joint import EngineInEach
from lora_grpo.engines.owned import OwnedEngine, owned
from lora_grpo.engines.rendering import rendering
from lora_grpo.errors import ConfigError, StoreLocked
from lora_grpo.grpo.optimizer import build_optimizer
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics import Reporter
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.activations import LargestBatch
from lora_grpo.trainer.crew import Crew, CrewEngine, Unheard, launched
from lora_grpo.trainer.models import (
    Sharing,
    build_engine,
    build_policy_model,
    check_same_device,
    default_device,
    shared_base,
)
from lora_grpo.trainer.parts import Parts
from lora_grpo.trainer.planning import Plan, checkpoints, plan
from lora_grpo.trainer.shared import Shared

if TYPE_CHECKING:
    from lora_grpo.remote.server import StoreServer

__all__ = ["assemble", "keeps_state", "refuse_live", "retention"]


def assemble(
    closing: ExitStack,
    reporter: Reporter | Unheard,
    crew: Crew,
    config: GRPOConfig,
    *,
    model: ModelConfig | nn.Module,
    peft_config: Any,
    tokenizer: Any,
    engine: Engine | None,
    engine_config: EngineConfig,
    keep: KeepConfig,
    run_dir: Path,
    store_root: str | Path | None,
    share_base_weights: Sharing,
    batch: LargestBatch,
    shared: Shared | None = None,
) -> Parts:
    """Build what is not given; `closing` gets what must be closed: the engine first, which reads the store's files.

    `batch` is the largest that the trainer computes at a time. On CUDA as many tokens make every micro-batch, so that
    shorter rows fill it too. Of what is `shared`, `engine` is given, and the base is not loaded again.

    With several processes, each builds its own; only the store, `tokenizer`, and an engine that is servers, are the
    first one's. What fails in one of them fails in all.
    """
    processes, sharing = crew.processes, _sharing(share_base_weights)
    processes.first(lambda: refuse_live(run_dir))
    given = any(processes.gather(engine is not None))
    sized = with_room(engine_config, config.max_staleness)
    twice = config.gradient_checkpointing
    if twice is None and shared is not None:
        twice = shared.checkpointing
    if given:
        twice = processes.each(lambda: checkpoints(model, peft_config, batch, twice))
    else:  # what is refused here leaves nothing behind
        planned = processes.each(lambda: plan(model, peft_config, sized, sharing, batch, twice))
        start = _prepared(reporter, model, sized, sharing, planned)
        twice = planned.checkpointing
    most = config.max_tokens_per_micro_batch
    if most is None and default_device().type == "cuda":
        most = batch.rows * batch.length
    config = config.replace(gradient_checkpointing=any(processes.gather(twice)), max_tokens_per_micro_batch=most)
    store = processes.each(lambda: _open_store(closing, crew, store_root, run_dir, keep, engine_config))
    if given:
        engine = None if engine is None else taken_over(closing, engine, config, built=False)
    else:
        here = crew.leads or not sized.urls
        engine = processes.each(lambda: taken_over(closing, start(), config, built=True) if here else None)
    with reporter.capture():
        built, base = processes.each(
            lambda: _trained_model(reporter, model, peft_config, engine, config, sharing, shared)
        )
        policy_model, optimizer = _distributed(built, config, base)
    accelerator = launched()
    policy = Policy(policy_model, config, accelerator=accelerator, optimizer=optimizer)
    sync = NativeSync(
        policy_model,
        engine,
        store,
        accelerator=accelerator,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        keep_state=keeps_state(keep),
        tokenizer=tokenizer,
        proofs=None if shared is None else shared.proofs,
    )
    closing.callback(sync.close)
    asked = _led(crew, sync, engine)
    return Parts(asked, rendering(asked, tokenizer, policy_model), policy_model, policy, sync)


def _sharing(asked: Sharing) -> Sharing:
    """As asked, but for "auto" with FSDP2, which would shard the engine's own weights."""
    accelerator = launched()
    return False if asked == "auto" and accelerator is not None and accelerator.is_fsdp2 else asked


def _open_store(
    closing: ExitStack,
    crew: Crew,
    root: str | Path | None,
    run_dir: Path,
    keep: KeepConfig,
    engine_config: EngineConfig,
) -> AdapterStore | None:
    """The first process's, with the server that it is pulled from, where there is to be one."""
    if not crew.leads:
        return None
    store = AdapterStore(root, archive=run_dir, retention=retention(keep), budget_bytes=keep.budget_bytes)
    closing.callback(store.close)
    if engine_config.store_address is not None:
        closing.enter_context(store_server(store, engine_config.store_address))
    return store


def store_server(store: AdapterStore, address: str) -> StoreServer:
    """What servers that share no disk with the trainer pull versions from; the token is the environment's."""
    from lora_grpo.remote.server import StoreServer

    host, _, port = address.rpartition(":")
    return StoreServer(store, host=host, port=int(port))


def _prepared(
    reporter: Reporter | Unheard,
    model: ModelConfig | nn.Module,
    engine_config: EngineConfig,
    sharing: Sharing,
    planned: Plan,
) -> Callable[[], Engine]:
    """How to start the engine. All that can be found wrong before is, in every process: engines in the trainers' own
    wait for each other while they start, and one that never began would keep the others waiting."""

    reporter.message(f"memory: {planned.memory}" + (", activations computed twice" if planned.checkpointing else ""))
    reporter.message("starting the engine")

    def start() -> Engine:
        with reporter.capture():
            return build_engine(
                model, engine_config, planned.rank, targets=planned.leaves, share_base_weights=sharing is True
            )

    return start


def _trained_model(
    reporter: Reporter | Unheard,
    model: ModelConfig | nn.Module,
    peft_config: Any,
    engine: Engine | None,
    config: GRPOConfig,
    sharing: Sharing,
    shared: Shared | None,
) -> tuple[nn.Module, Any | None]:
    """This process's PEFT model, and the base that it has from the engine or with other trainers."""
    if shared is not None:
        base = shared.own_modules()
    else:
        base = None if engine is None else shared_base(sharing, model, engine, reporter.message)
    built = build_policy_model(model, peft_config, config.seed, base)
    if engine is not None:
        check_same_device(built, engine)
    return built, base


def _led(crew: Crew, sync: NativeSync, engine: Engine | None) -> Engine:
    """The engine that the trainer asks: its own, unless there is one in every process."""
    if engine is None or not crew.leads:
        return sync.engine
    return CrewEngine(crew, engine) if isinstance(sync.engine, EngineInEach) else engine


def _distributed(model: nn.Module, config: GRPOConfig, base: Any) -> tuple[Any, Any]:
    """The model with its optimizer as accelerate's FSDP2 shards them, if it is set to; else the model, and None."""
    accelerator = launched()
    if accelerator is None or not accelerator.is_fsdp2:
        return model, None
    if base is not None:
        raise ConfigError("share_base_weights with FSDP2 would shard the engine's own weights; leave it False")
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    return model, optimizer


def with_room(config: EngineConfig, max_staleness: int) -> EngineConfig:
    """Slots for the version of a rollout that goes on, and for those that may be published meanwhile."""
    if not max_staleness:
        return config
    roomy: EngineConfig = config.replace(max_loras=max(config.max_loras, max_staleness + 1))
    return roomy


def taken_over(closing: ExitStack, engine: Engine, config: GRPOConfig, *, built: bool) -> Engine:
    """The engine as the trainer uses it. Where generation goes on while the trainer works, a thread owns it."""
    if config.max_staleness:
        engine = owned(engine, config.stall_timeout_s)
    if built:
        closing.callback(engine.close)
    elif isinstance(engine, OwnedEngine):
        closing.callback(engine.release)
    return engine


@contextmanager
def untouched_when_stopped(*folders: str | Path | None) -> Iterator[None]:
    """Ctrl-C while the parts are built leaves no folder that was not there, or was empty, before.

    After an error they stay, with what the libraries said of it.
    """
    paths = [Path(folder) for folder in folders if folder is not None]
    new = [path for path in paths if not path.exists() or (path.is_dir() and not any(path.iterdir()))]
    try:
        yield
    except KeyboardInterrupt:
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        raise


def refuse_live(run_dir: Path) -> None:
    """Raises `StoreLocked` naming the process that has the run open, before anything expensive is started."""
    who = holder(run_dir)
    if who is not None:
        raise StoreLocked(f"{run_dir} is open in {who}; stop that process first, or choose another run directory")
