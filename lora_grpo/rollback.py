"""Back to an earlier version: the engine first, then the trainer, then `HEAD`; or nothing at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from lora_grpo.adapters.peft_format import LoraModule
from lora_grpo.adapters.peft_read import load_rounded
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.target import Target, resolve
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine
from lora_grpo.errors import UnknownVersion
from lora_grpo.state import TrainerState, capture_state, check_state, read_state, restore_state

__all__ = ["Outcome", "RollbackReport", "Target", "kept_state", "resolve", "roll_back"]

Outcome: TypeAlias = Literal["restored", "reset", "kept", "none"]


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback did.

    `weights` are "exact" from the trainer state, or "rounded" to the serving dtype where none was kept. `optimizer`
    and `scheduler` are "restored", "reset" (moments forgotten), "kept" (left where they were) or "none" (not given).
    `extra` is what the caller gave with that version's push, empty where no state was kept.
    """

    version: AdapterVersion
    left: AdapterVersion
    weights: Literal["exact", "rounded"]
    optimizer: Outcome
    scheduler: Outcome
    random_state: Outcome
    extra: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"rolled back from {self.left} to {self.version} (step {self.version.step}): weights {self.weights}, "
            f"optimizer {self.optimizer}, scheduler {self.scheduler}, random state {self.random_state}"
        )


def roll_back(
    store: AdapterStore,
    engine: Engine,
    modules: list[LoraModule],
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    to: Target,
) -> RollbackReport:
    """Serve and train from an earlier version again; if any part fails, nothing has changed.

    The engine confirms the version first, then the trainer is put back, then `HEAD` moves.
    """
    left, version = store.head, resolve(store, to)
    if left is None:
        raise UnknownVersion("nothing was promoted yet: there is no version to roll back to")
    served = engine.loaded()
    if version not in served:
        version = store.restore(version)
    state = kept_state(store, version, modules)
    before = capture_state(modules, optimizer, scheduler, {})
    with store.lease(version):
        try:
            engine.load(version)
            report = _restore(state, version, left, modules, optimizer, scheduler)
            store.promote(version)
        except BaseException:
            restore_state(before, modules, optimizer, scheduler)
            _serve_again(engine, served)
            raise
    return report


def kept_state(store: AdapterStore, version: AdapterVersion, modules: list[LoraModule]) -> TrainerState | None:
    """The version's trainer state if it was kept, checked against these modules. Raises `StoreCorrupt`."""
    files = store.load_state(version.number)
    if files is None:
        return None
    state = read_state(files)
    check_state(state, modules)
    return state


def _serve_again(engine: Engine, served: Sequence[AdapterVersion]) -> None:
    """Leave loaded what was loaded before, in the same order of use."""
    for version in set(engine.loaded()) - set(served):
        engine.unload(version)
    for version in served:
        engine.load(version)


def _restore(
    state: TrainerState | None,
    version: AdapterVersion,
    left: AdapterVersion,
    modules: list[LoraModule],
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
) -> RollbackReport:
    if state is None:
        load_rounded(version, modules)
    else:
        restore_state(state, modules, optimizer, scheduler)
    has_optimizer, has_scheduler = (state.has_optimizer, state.has_scheduler) if state else (False, False)
    if optimizer is not None and not has_optimizer:
        optimizer.state = defaultdict(dict)
    return RollbackReport(
        version,
        left,
        "exact" if state else "rounded",
        "none" if optimizer is None else "restored" if has_optimizer else "reset",
        "none" if scheduler is None else "restored" if has_scheduler else "kept",
        "restored" if state else "kept",
        dict(state.meta["extra"]) if state else {},
    )
