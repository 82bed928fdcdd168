"""Back to an earlier version: the engine first, then the trainer, then `HEAD`; or nothing at all."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lora_grpo.adapters.peft_form.modules import reshard
from lora_grpo.adapters.peft_form.serving import assign_rounded, load_tensors
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import WEIGHTS_FILE, AdapterVersion, Target
from lora_grpo.engines.base import Engine, is_remote
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.errors import ConfigError, UnknownVersion
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
        return (
            f"rolled back from {self.left} to {self.version} (step {self.version.step}): weights {self.weights}, "
            f"optimizer {self.optimizer}, scheduler {self.scheduler}, random state {self.random_state}"
        )


def roll_back(store: AdapterStore | None, engine: Engine, training: Training, to: Target) -> RollbackReport:
    """Serve and train from an earlier version again; if any part fails in any process, nothing has changed in any.

    The engine confirms the version first, then the trainer is put back, then `HEAD` moves. Called by every process;
    the first one has the store."""
    processes = training.processes
    left, version = processes.first(lambda: (the_firsts(store).head, the_firsts(store).get(to)))
    if left is None:
        raise UnknownVersion("no version was promoted yet, so there is none to roll back to")
    served = engine.loaded()
    if not all(processes.gather(version in served)):
        version = processes.first(lambda: the_firsts(store).restore(version))
    state = kept_state(store, version, training)
    before = capture_state(training, {})
    processes.first(lambda: the_firsts(store).acquire(version))
    try:
        _load(engine, version, training)
        report = _restore(state, version, left, training)
        processes.first(lambda: the_firsts(store).promote(version))
        return report
    except BaseException:
        try:
            _serve_again(engine, served, training)
        finally:
            restore_state(before, training)
        raise
    finally:
        if store is not None:
            store.release(version)


def kept_state(store: AdapterStore | None, version: AdapterVersion, training: Training) -> TrainerState | None:
    """The version's trainer state if it was kept, checked against these modules (`StoreCorrupt`), in every process."""

    def read() -> TrainerState | None:
        if (files := the_firsts(store).load_state(version.number)) is None:
            return None
        state = read_state(files)
        check_state(state, training.modules)
        return state

    return training.processes.first(read)


def the_firsts(store: AdapterStore | None) -> AdapterStore:
    """Raises `ConfigError` in a process that has none."""
    if store is None:
        raise ConfigError("only the first process has the store: pass store= there and use it there")
    return store


def _load(engine: Engine, version: AdapterVersion, training: Training) -> None:
    """Have the engine prove a version. For servers, which are told what to answer, the model takes on its weights:
    whoever calls this puts the trainer in order afterwards."""
    if not is_remote(engine) or version in engine.loaded():
        engine.load(version)
        return
    _take_on(version, training)
    sequences = probe_sequences(engine.describe_base())
    engine.load(version, expected=teacher_logprobs(training.model, sequences))


def _serve_again(engine: Engine, served: Sequence[AdapterVersion], training: Training) -> None:
    """Leave loaded what was loaded before, in the same order of use."""
    for version in set(engine.loaded()) - set(served):
        engine.unload(version)
    for version in served:
        _load(engine, version, training)


def _take_on(version: AdapterVersion, training: Training) -> None:
    """Give the model the weights that `version` serves."""
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
