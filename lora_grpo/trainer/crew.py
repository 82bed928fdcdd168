"""Several trainer processes: the first runs the trainer, the others do with it what takes all of them."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from operator import attrgetter
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from lora_grpo.engines.base import Engine
from lora_grpo.grpo.optimizer import apply_settings
from lora_grpo.grpo.processes import Processes
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync
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
    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.leads = processes.index == 0  # whether the run is this process's: its files, its terminal, its decisions
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
        if name in ("load", "unload", "generate"):
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
    """What a process other than the first has to tell: nothing, for a run says everything once."""

    capture = nullcontext

    def message(self, text: str) -> None:
        return None
