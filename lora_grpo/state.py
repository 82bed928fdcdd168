"""Trainer state: exact weights, optimizer, scheduler and random state, as tensors and JSON, never pickle."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.distributed.tensor import DTensor

from lora_grpo.adapters.files.disk import parse_json
from lora_grpo.adapters.peft_form.modules import LoraModule, assign, reshard, sharded_like, whole
from lora_grpo.adapters.peft_form.serving import load_tensors
from lora_grpo.adapters.version import STATE_FILE, STATE_TENSORS_FILE
from lora_grpo.errors import ConfigError, StoreCorrupt
from lora_grpo.grpo.processes import Processes

_WITH_PLAIN_STORAGE = (torch.Tensor, torch.nn.Parameter, DTensor)
_META = {"param_groups", "optimizer", "scheduler", "extra"}


@dataclass(frozen=True)
class TrainerState:
    """A trainer at one moment. `tensors` are on the CPU and its own; `meta` is JSON.

    Tensor names: `weights/MODULE.A` and `.B`; `optimizer/INDEX/NAME`, `param_groups/...` and `scheduler/...`, by the
    keys that lead to it; all of them whole; and the random state of the first process, `rng/cpu` and `rng/cuda`, and of
    others, `rng/cpu/INDEX` and `rng/cuda/INDEX`."""

    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any]

    def to_files(self) -> tuple[dict[str, tuple[bytes, ...]], dict[str, Any]]:
        return {STATE_TENSORS_FILE: (save(dict(self.tensors)),)}, dict(self.meta)


@dataclass(frozen=True, slots=True)
class Training:
    """The live objects whose state is kept: the adapter's modules, optimizer and scheduler (None: not given)."""

    model: torch.nn.Module
    modules: list[LoraModule]
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    processes: Processes


def read_state(files: Mapping[str, Path]) -> TrainerState:
    """What `to_files` wrote. Raises `StoreCorrupt` when it cannot be read."""
    try:
        state = TrainerState(load_tensors(files[STATE_TENSORS_FILE]), parse_json(files[STATE_FILE].read_bytes()))
        if missing := _META - state.meta.keys():
            raise ValueError(f"{STATE_FILE} lacks {sorted(missing)}; if another release wrote it, resume with that one")
        return state
    except (KeyError, ValueError, AttributeError, OSError) as error:
        raise StoreCorrupt(f"the trainer state in {[*map(str, files.values())]} is unreadable: {error}") from error


def capture_state(training: Training, extra: Mapping[str, Any]) -> TrainerState:
    """Copy a trainer's state to the CPU, whole in every process: a collective. `ConfigError`: `extra` is no JSON."""
    reshard(training.model)
    optimizer, scheduler = training.optimizer, training.scheduler
    tensors = adapter_weights(training.modules) | _random_states(training.processes)
    saved = {"state": {}, "param_groups": None} if optimizer is None else optimizer.state_dict()
    meta = {
        "param_groups": _coded(saved["param_groups"], "param_groups", tensors),
        "optimizer": _coded({str(index): kept for index, kept in saved["state"].items()}, "optimizer", tensors),
        "scheduler": None if scheduler is None else _coded(scheduler.state_dict(), "scheduler", tensors),
        "extra": dict(extra),
    }
    try:
        return TrainerState(tensors, json.loads(json.dumps(meta)))
    except TypeError as error:
        states = f"the state of {type(getattr(optimizer, 'optimizer', optimizer)).__name__}, of the schedule or extra="
        raise ConfigError(f"{states} is more than numbers, text and tensors: nothing is pickled: {error}") from error


def check_state(state: TrainerState, modules: list[LoraModule]) -> None:
    """Raises `StoreCorrupt` unless the state holds exactly these modules' weights, in their shapes."""
    expected = {name: tuple(parameter.shape) for name, parameter in named_weights(modules)}
    found = {name: tuple(t.shape) for name, t in state.tensors.items() if name.startswith("weights/")}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise StoreCorrupt(f"{odd} is {found.get(odd)} in the trainer state but {expected.get(odd)} in the model")


def restore_state(state: TrainerState, training: Training) -> None:
    """Put weights, optimizer, scheduler and random state back as they were; what the state lacks is left alone. Every
    process gives the same state, and takes its own shards and its own random state of it; no collective."""
    check_state(state, training.modules)
    reshard(training.model)
    if training.optimizer is not None and state.meta["param_groups"] is not None:
        _restore_optimizer(state, training.optimizer)
    for name, parameter in named_weights(training.modules):
        assign(parameter, state.tensors[name])
    if training.scheduler is not None and state.meta["scheduler"] is not None:
        training.scheduler.load_state_dict(_decoded(state.meta["scheduler"], state.tensors))
    own = _random_suffix(training.processes.index)
    if f"rng/cpu{own}" in state.tensors:
        torch.set_rng_state(state.tensors[f"rng/cpu{own}"])
    if f"rng/cuda{own}" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors[f"rng/cuda{own}"])


def _coded(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` so that it comes back from JSON as it was: a schedule's milestones are a Counter of whole numbers.

    What JSON has no form of is an object of one key: "$tuple", "$Counter", "$dict" where keys are not plain text, or
    "$tensor", which is in `tensors` by `name` and the keys that lead to it."""
    if type(value) in _WITH_PLAIN_STORAGE:
        # Of keys 1 and "1", too, each has its own.
        while name in tensors:
            name += "'"
        tensors[name] = _copied(value)
        return {"$tensor": name}
    if isinstance(value, Mapping):
        coded = [(_coded(key, name, tensors), _coded(item, f"{name}/{key}", tensors)) for key, item in value.items()]
        if isinstance(value, Counter):
            return {"$Counter": coded}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(coded) if plain else {"$dict": coded}
    if isinstance(value, list | tuple):
        items = [_coded(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    return value


def _decoded(value: Any, tensors: Mapping[str, torch.Tensor], like: torch.Tensor | None = None) -> Any:
    """What `_coded` was given, in containers and tensors of its own; a tensor in the shape of `like` is cut as that is,
    and any other (a step count) whole everywhere."""
    if isinstance(value, list):
        return [_decoded(item, tensors, like) for item in value]
    if not isinstance(value, Mapping):
        return value
    match next(iter(value), ""):
        case "$tuple":
            return tuple(_decoded(value["$tuple"], tensors, like))
        case "$tensor":
            tensor = tensors[value["$tensor"]].clone()
            if like is None or not tensor.dim() or tensor.shape != like.shape:
                return tensor
            return sharded_like(like, tensor)
        case "$dict" | "$Counter" as kind:
            pairs = dict(_decoded(value[kind], tensors, like))
            return Counter(pairs) if kind == "$Counter" else pairs
    return {key: _decoded(item, tensors, like) for key, item in value.items()}


def _restore_optimizer(state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
    """Raises `ConfigError`, before anything changes, where it holds other parameters than it did."""
    groups = _decoded(state.meta["param_groups"], state.tensors)
    now, then = ([len(group["params"]) for group in found] for found in (optimizer.param_groups, groups))
    if now != then:
        found = f"the optimizer has groups of {now} parameters, and of {then} when this state was kept"
        raise ConfigError(f"{found}; pass one of the same groups, or start anew from the version (lora-grpo export)")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = state.meta["optimizer"].items()
    entries = {int(index): _decoded(values, state.tensors, parameters[int(index)]) for index, values in moments}
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def generator_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_generator_states(states: tuple[Any, ...]) -> None:
    cpu, cuda, numbers, plain = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(numbers)
    random.setstate(plain)


@contextmanager
def generators_kept() -> Iterator[None]:
    before = generator_states()
    try:
        yield
    finally:
        set_generator_states(before)


def _random_states(processes: Processes) -> dict[str, torch.Tensor]:
    own = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["rng/cuda"] = torch.cuda.get_rng_state()
    everyone = enumerate(processes.gather(own))
    return {f"{name}{_random_suffix(index)}": tensor for index, states in everyone for name, tensor in states.items()}


def _random_suffix(index: int) -> str:
    return f"/{index}" if index else ""


def adapter_weights(modules: list[LoraModule]) -> dict[str, torch.Tensor]:
    """Copies of A and B on the CPU, whole in every process (of sharded ones, a collective), by the names of a state."""
    return {name: _copied(parameter) for name, parameter in named_weights(modules)}


def named_weights(modules: list[LoraModule]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"weights/{one.path}.{name}", ab) for one in modules for name, ab in (("A", one.a_RI), ("B", one.b_OR))]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).to("cpu", copy=True)
