"""Back to an earlier version: the engine first, then the trainer, then `HEAD`; or nothing at all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from lora_grpo.adapters.peft_format import LoraModule
from lora_grpo.adapters.peft_read import load_rounded
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine
from lora_grpo.errors import UnknownVersion
from lora_grpo.state import TrainerState, capture_state, check_state, read_state, restore_state

Target: TypeAlias = int | str
"""A version's number, "parent", or "best:METRIC" ("worst is best" metrics: "best:-METRIC")."""
Outcome: TypeAlias = Literal["restored", "reset", "kept", "none"]


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback did.

    `weights` are "exact" from the trainer state, or "rounded" to the serving dtype where none was kept. `optimizer`
    and `scheduler` are "restored", "reset" (moments forgotten), "kept" (left where they were) or "none" (not given).
    `extra` is what the caller gave with that version's push.
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


def resolve(store: AdapterStore, to: Target) -> AdapterVersion:
    """The version that `to` names. Raises `UnknownVersion` with what there is to choose from."""
    head = store.head
    if isinstance(to, int):
        return store.get(to)
    if to == "parent" and head is not None:
        if head.parent is None:
            raise UnknownVersion(f"{head} has no parent: it was the first; name a version by its number")
        return store.get(head.parent)
    if to.startswith("best:"):
        return _best(store, to.removeprefix("best:"))
    raise UnknownVersion(f"to={to!r} names no version; use a number, 'parent' or 'best:METRIC'")


def _best(store: AdapterStore, metric: str) -> AdapterVersion:
    sign = -1.0 if metric.startswith("-") else 1.0
    name = metric.removeprefix("-")
    metrics = {version: store.metrics(version.number) for version in store.list()}
    scored = {version: values[name] for version, values in metrics.items() if isinstance(values.get(name), int | float)}
    if not scored:
        known = sorted({key for values in metrics.values() for key in values})
        raise UnknownVersion(f"no kept version has a recorded {name!r}; recorded are {known}")
    return max(scored, key=lambda version: sign * scored[version])


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
    was_loaded = version in engine.loaded()
    if not was_loaded:
        version = store.restore(version)
    state = _kept_state(store, version, modules)
    with store.lease(version):
        engine.load(version)
        before = capture_state(modules, optimizer, scheduler, {})
        try:
            report = _restore(state, version, left, modules, optimizer, scheduler)
            store.promote(version)
        except BaseException:
            restore_state(before, modules, optimizer, scheduler)
            if not was_loaded:
                engine.unload(version)
            raise
    return report


def _kept_state(store: AdapterStore, version: AdapterVersion, modules: list[LoraModule]) -> TrainerState | None:
    files = store.load_state(version.number)
    if files is None:
        return None
    state = read_state(files)
    check_state(state, modules)
    return state


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
        if optimizer is not None:
            optimizer.state = defaultdict(dict)
        optimizer_did: Outcome = "none" if optimizer is None else "reset"
        return RollbackReport(
            version, left, "rounded", optimizer_did, "none" if scheduler is None else "kept", "kept", {}
        )
    restore_state(state, modules, optimizer, scheduler)
    if optimizer is not None and not state.has_optimizer:
        optimizer.state = defaultdict(dict)
    return RollbackReport(
        version,
        left,
        "exact",
        "none" if optimizer is None else "restored" if state.has_optimizer else "reset",
        "none" if scheduler is None else "restored" if state.has_scheduler else "kept",
        "restored",
        dict(state.meta["extra"]),
    )
