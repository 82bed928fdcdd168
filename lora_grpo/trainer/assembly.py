"""A trainer's parts, put together in each of its processes: engine, PEFT model, store, sync, policy, prompts.

Of several processes the first runs the trainer, and the others do with it what takes all of them."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from operator import attrgetter
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from transformers import PreTrainedModel

from lora_grpo.adapters.files.locks import holder
from lora_grpo.adapters.files.places import require_kept
from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keeps_state, retention
from lora_grpo.config import KeepConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.wrapped import EngineInEach, OwnedEngine, owned, rendering
from lora_grpo.errors import ConfigError, StoreLocked
from lora_grpo.grpo.optimizer import apply_settings, build_optimizer
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.models import Shared, Sharing, build_policy_model, check_same_device, default_device, shared_base
from lora_grpo.trainer.preflight import Preflight
from lora_grpo.trainer.room import Room, Wanted, plan_room
from lora_grpo.types import derive_seed

P = ParamSpec("P")
R = TypeVar("R")


def launched(timeout_s: float | None = None) -> Accelerator | None:
    """accelerate's own view of what `accelerate launch` or `torchrun` started; None for a single process. The first
    call joins them, unless the caller has: they then wait for each other `timeout_s` at most (None: its default)."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if not _joined:
        waiting = [] if timeout_s is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))]
        _joined.append(Accelerator(kwargs_handlers=list(waiting)))
    return _joined[0]


_joined: list[Accelerator] = []  # this process's accelerator, once there is one


@dataclass(frozen=True)
class Parts:
    """What one process trains with. With several processes, the first one's `engine` stands for all of theirs."""

    engine: Engine
    rendering: Engine  # that engine, asked in prompts as the trainer's tokenizer renders them
    policy: Policy
    sync: NativeSync


class Crew:
    def __init__(self, timeout_s: float) -> None:
        self.processes = Processes(launched(timeout_s))
        self.leads = self.processes.index == 0  # whether files, terminal and decisions are this process's
        self.parts: Parts
        self._order: Callable[[partial[Any]], Any] | None = None

    def lead(self, act: Callable[[], R]) -> R:
        """`act` runs in the first process, and gives or raises the same in all; the others follow its orders."""
        if self.processes.count == 1 or self._order is not None:
            return act()
        return self.processes.lead(partial(self._led, act), self._do)

    def __call__(self, act: Callable[Concatenate[Parts, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """`act(parts, ...)` in every process, each with its own parts; what it gives here. Only inside `lead`."""
        order: partial[R] = partial(act, *args, **kwargs)  # type: ignore[arg-type]
        if self.processes.count == 1:
            return self._do(order)
        if self._order is None:
            raise RuntimeError("only the first process gives orders, and only while it leads")
        return self._order(order)

    def _do(self, order: partial[Any]) -> Any:
        return order.func(self.parts, *order.args, **order.keywords)

    def _led(self, act: Callable[[], R], order: Callable[[partial[Any]], Any]) -> R:
        self._order = order
        try:
            return act()
        finally:
            self._order = None


def led(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A trainer's method that all processes call, and that runs in the first; see `Crew.lead`."""

    @wraps(method)
    def together(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.crew.lead(lambda: method(self, *args, **kwargs))

    return together


class CrewEngine:
    """The engines of all processes, as the first one's trainer uses them; see `EngineInEach`. All else is its own's."""

    def __init__(self, crew: Crew, own: Engine) -> None:
        self._crew, self._own = crew, own

    def __getattr__(self, name: str) -> Any:
        if name == "load":  # in each process the tensors that it holds itself are compared, not the first one's
            return lambda version, **_: self._crew(call, "sync.engine.load", version)
        if name in ("unload", "generate"):
            return partial(self._crew, call, f"sync.engine.{name}")
        return getattr(self._own, name)


# What all processes do; `parts` are each one's own.


def call(parts: Parts, method: str, /, *given: Any, **named: Any) -> Any:
    """Of a part, such as "sync.push"."""
    return attrgetter(method)(parts)(*given, **named)


def apply_optimizer_settings(parts: Parts, learning_rate_scale: float) -> None:
    apply_settings(parts.policy.optimizer, parts.policy.scheduler, parts.policy.config, learning_rate_scale)


def seed_everything(parts: Parts, seed: int) -> None:
    """Whatever a process drew before, a run depends on its own seed only; dropout differs between processes."""
    index = parts.policy.processes.index
    torch.manual_seed(derive_seed(seed, index) if index else seed)


class Unheard:
    capture = nullcontext

    def message(self, text: str) -> None:
        """A process other than the first has nothing to tell: a run says everything once."""


@dataclass
class Assembly:
    """Each process builds its own; only the store, the tokenizer and an engine that is servers are the first one's."""

    closing: ExitStack  # closes the engine first, which reads the store's files
    reporter: Reporter | Unheard
    crew: Crew
    made_of: Preflight
    sharing: Sharing
    shared: Shared | None = None

    def __post_init__(self) -> None:
        self.keep, accelerator = self.made_of.spec.keep or KeepConfig(), launched()
        self.sharded = accelerator if accelerator and accelerator.is_fsdp2 else None
        if self.sharded is not None:
            if self.sharing is True or self.shared is not None:
                raise ConfigError("share_base_weights with FSDP2 would shard the engine's own weights; leave it False")
            self.sharing = False

    def parts(self) -> Parts:
        """Everything is checked first, then the store is there, then the engine, and the model last."""
        processes = self.crew.processes
        processes.first(lambda: refuse_live(Path(self.made_of.spec.run_dir)))
        planned, config = self._planned()
        store = processes.each(lambda: self._store(planned))
        engine = processes.each(lambda: self._engine(planned))
        with self.reporter.capture():
            model, optimizer = processes.each(lambda: self._model(engine)), None
            if self.sharded is not None:
                model, optimizer = self.sharded.prepare(model, build_optimizer(model, config))
        policy = Policy(model, config, accelerator=launched(), optimizer=optimizer)
        tokenizer = self.made_of.tokenizer if self.crew.leads else None
        sync = NativeSync(
            model,
            engine,
            store,
            accelerator=launched(),
            optimizer=policy.optimizer,
            scheduler=policy.scheduler,
            keep_state=keeps_state(self.keep),
            tokenizer=tokenizer,
            proofs=None if self.shared is None else self.shared.proofs,
        )
        self.closing.callback(sync.close)
        asked = engine if self.crew.leads and engine is not None else sync.engine
        if self.crew.leads and isinstance(sync.engine, EngineInEach):
            asked = cast(Engine, CrewEngine(self.crew, asked))
        return Parts(asked, rendering(asked, tokenizer, model), policy, sync)

    def _planned(self) -> tuple[Room | None, GRPOConfig]:
        """What an engine is started for (None: it is given), and the settings with what they left open."""
        made_of, processes, config = self.made_of, self.crew.processes, self.made_of.config
        longest = processes.first(lambda: made_of.wanted.prompt_tokens)
        twice, most = config.gradient_checkpointing, config.max_tokens_per_micro_batch
        if twice is None and self.shared is not None:
            twice = self.shared.checkpointing
        given = any(processes.gather(made_of.engine is not None))
        wanted = Wanted(made_of.spec.peft_config, config.replace(gradient_checkpointing=twice), longest)
        room = processes.each(lambda: self._room(wanted, given))  # what is refused here leaves nothing behind
        if not given:
            self.reporter.message(f"memory: {room}")
            urls = ", ".join(made_of.engine_config.urls)
            self.reporter.message(f"connecting to {urls}" if urls else "starting the engine")
        # There every micro-batch has as many tokens as the largest one, so that shorter rows fill it too.
        if most is None and default_device().type == "cuda":
            most = wanted.batch.rows * wanted.batch.length
        twice = any(processes.gather(twice if room is None else room.checkpointing))
        return None if given else room, config.replace(gradient_checkpointing=twice, max_tokens_per_micro_batch=most)

    def _room(self, wanted: Wanted, given: bool) -> Room | None:
        """None where nothing is open: with an engine given, all but whether activations are computed twice."""
        model = self.made_of.model
        told = isinstance(model, ModelConfig) or isinstance(peft_model_of(model).get_base_model(), PreTrainedModel)
        if given and (wanted.config.gradient_checkpointing is not None or not told):
            return None
        sharing = self.sharing is True if given else self.sharing
        return plan_room(model, [wanted], self.made_of.engine_config, sharing, 1, starts=not given).require()

    def _store(self, planned: Room | None) -> AdapterStore | None:
        if not self.crew.leads:
            return None
        spec, rules, most = self.made_of.spec, retention(self.keep), self.keep.budget_bytes
        store = AdapterStore(spec.store_root, archive=spec.run_dir, retention=rules, budget_bytes=most)
        self.closing.callback(store.close)
        if planned is not None:
            require_kept(store.root, self.keep.on_tmpfs, planned.version_bytes)
        if (address := self.made_of.engine_config.store_address) is not None:
            from lora_grpo.remote.server import StoreServer

            # What servers that share no disk with the trainer pull versions from; the token is the environment's.
            host, _, port = address.rpartition(":")
            self.closing.enter_context(StoreServer(store, host=host, port=int(port)))
        return store

    def _engine(self, planned: Room | None) -> Engine | None:
        """This process's, None where the first one's serves all."""
        engine = self.made_of.engine
        # All that can be found wrong before was: engines in the trainers' own processes wait for each other while they
        # start, and one that never began would hold them up.
        if planned is not None and (self.crew.leads or not self.made_of.engine_config.urls):
            with self.reporter.capture():
                engine = planned.start(self.made_of.model, self.sharing)
        if engine is None:
            return None
        if self.made_of.config.max_staleness:
            engine = owned(engine, self.made_of.config.stall_timeout_s)
        if planned is not None:
            self.closing.callback(engine.close)
        elif isinstance(engine, OwnedEngine):
            self.closing.callback(engine.release)
        return engine

    def _model(self, engine: Engine | None) -> nn.Module:
        model, spec, base = self.made_of.model, self.made_of.spec, None
        if self.shared is not None:
            base = self.shared.own_modules()
        elif engine is not None:
            base = shared_base(self.sharing, model, engine, self.reporter.message)
        built = build_policy_model(model, spec.peft_config, spec.config.seed, base)
        if engine is not None:
            check_same_device(built, engine)
        return built


@contextmanager
def untouched_when_stopped(*folders: str | Path | None) -> Iterator[None]:
    """Ctrl-C leaves no folder that was not there, or was empty, before; after an error they stay, with its logs."""
    paths = [Path(folder) for folder in folders if folder is not None]
    new = [path for path in paths if not path.exists() or (path.is_dir() and not any(path.iterdir()))]
    try:
        yield
    except KeyboardInterrupt:
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        raise


def refuse_live(run_dir: Path) -> None:
    if (who := holder(run_dir)) is not None:
        raise StoreLocked(f"{run_dir} is open in {who}; stop that process first, or choose another run directory")
