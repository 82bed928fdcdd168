"""Back to an earlier version: the engine first, then the trainer, then `HEAD`; or nothing at all."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from lora_grpo.adapters.peft_form.modules import reshard
from lora_grpo.adapters.peft_form.serving import Held, assign_rounded, load_tensors
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import WEIGHTS_FILE, AdapterVersion, Target
from lora_grpo.engines.base import Engine, LoadReceipt, is_remote
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.errors import UnknownVersion
from lora_grpo.grpo.forward import teacher_logprobs
from lora_grpo.state import TrainerState, Training, capture_state, check_state, read_state, restore_state

Outcome: TypeAlias = Literal["restored", "reset", "kept", "none"]


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback did.

    `weights` are "exact" from the trainer state, or "rounded" to the serving dtype where none was kept. `optimizer`,
    `scheduler` and `random_state` are "restored", "reset" (as at a start: without moments, freshly seeded), "kept"
    (left where they were) or "none" (not given). `extra` is what the caller gave with that version's push, empty where
    no state was kept."""

    version: AdapterVersion
    left: AdapterVersion
    weights: Literal["exact", "rounded"]
    optimizer: Outcome
    scheduler: Outcome
    random_state: Outcome
    extra: dict[str, Any]

    def __str__(self) -> str:
        if self.optimizer == self.random_state == "kept":
            return f"{self.version} is HEAD already: nothing has changed"
        went = f"rolled back from {self.left} to {self.version} (step {self.version.step})"
        rest = f"optimizer {self.optimizer}, scheduler {self.scheduler}, random state {self.random_state}"
        return f"{went}: weights {self.weights}, {rest}"


def roll_back(store: Callable[[], AdapterStore], engine: Engine, training: Training, to: Target) -> RollbackReport:
    """Serve and train from an earlier version again; if any part fails in any process, nothing has changed in any.
    Called by every process; `store` is asked for in the first one alone."""
    processes = training.processes
    left, version = processes.first(lambda: (store().head, store().get(to)))
    if left is None:
        raise UnknownVersion("no version was promoted yet, so there is none to roll back to")
    served = engine.loaded()
    if not all(processes.gather(version in served)):
        version = processes.first(lambda: store().restore(version))
    state = kept_state(store, version, training)
    before = capture_state(training, {})
    processes.first(lambda: store().acquire(version))
    try:
        _load(engine, version, training)
        report = _restore(state, version, left, training)
        processes.first(lambda: store().promote(version))
        return report
    except BaseException:
        try:
            for other in set(engine.loaded()) - set(served):
                engine.unload(other)
            for earlier in served:
                _load(engine, earlier, training)
        finally:
            restore_state(before, training)
        raise
    finally:
        if processes.index == 0:
            store().release(version)


def kept_state(store: Callable[[], AdapterStore], version: AdapterVersion, training: Training) -> TrainerState | None:
    """The version's trainer state if it was kept, checked against these modules (`StoreCorrupt`), in every process."""

    def read() -> TrainerState | None:
        if (files := store().load_state(version.number)) is None:
            return None
        state = read_state(files)
        check_state(state, training.modules)
        return state

    return training.processes.first(read)


def load_as_it_is(engine: Engine, version: AdapterVersion, model: nn.Module, held: Held | None = None) -> LoadReceipt:
    """Have the engine prove the version that the model computes now: nobody can look into a server, so it is told what
    the probe's tokens have to look like."""
    if not is_remote(engine):
        return engine.load(version, held=held)
    return engine.load(version, expected=teacher_logprobs(model, probe_sequences(engine.describe_base())))


def _load(engine: Engine, version: AdapterVersion, training: Training) -> None:
    """For servers the model takes on the version's weights: whoever calls this puts the trainer in order afterwards."""
    if not is_remote(engine) or version in engine.loaded():
        engine.load(version)
    else:
        _take_on(version, training)
        load_as_it_is(engine, version, training.model)


def _take_on(version: AdapterVersion, training: Training) -> None:
    tensors = training.processes.first(lambda: load_tensors(version.path / WEIGHTS_FILE))
    reshard(training.model)
    training.processes.each(lambda: assign_rounded(tensors, training.modules))


def _restore(
    state: TrainerState | None, version: AdapterVersion, left: AdapterVersion, training: Training
) -> RollbackReport:
    if state is None:
        _take_on(version, training)
    else:
        training.processes.each(lambda: restore_state(state, training))
    optimizer, scheduler = training.optimizer, training.scheduler
    meta = {} if state is None else state.meta
    has_optimizer, has_scheduler = meta.get("param_groups") is not None, meta.get("scheduler") is not None
    if optimizer is not None and not has_optimizer:
        optimizer.state = defaultdict(dict)
    moments: Outcome = "none" if optimizer is None else "restored" if has_optimizer else "reset"
    schedule: Outcome = "none" if scheduler is None else "restored" if has_scheduler else "kept"
    if state is None:
        return RollbackReport(version, left, "rounded", moments, schedule, "kept", {})
    return RollbackReport(version, left, "exact", moments, schedule, "restored", dict(meta.get("extra", {})))
