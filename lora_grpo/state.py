"""Trainer state: exact weights, optimizer, scheduler and random state, as tensors and JSON, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from lora_grpo.adapters.peft_format import LoraModule
from lora_grpo.errors import ConfigError, StoreCorrupt

TENSORS_FILE = "state.safetensors"
META_FILE = "state.json"


@dataclass(frozen=True)
class TrainerState:
    """A trainer at one moment. `tensors` are on the CPU and its own; `meta` is JSON.

    Tensor names: `weights/MODULE.A`, `weights/MODULE.B`, `optimizer/INDEX/NAME`, `rng/cpu`, `rng/cuda`.
    """

    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any]

    @property
    def has_optimizer(self) -> bool:
        return self.meta["param_groups"] is not None

    @property
    def has_scheduler(self) -> bool:
        return self.meta["scheduler"] is not None

    def to_files(self) -> tuple[dict[str, tuple[bytes, ...]], dict[str, Any]]:
        """The files of the archive and its metadata."""
        return {TENSORS_FILE: (save(dict(self.tensors)),)}, dict(self.meta)


def read_state(files: Mapping[str, Path]) -> TrainerState:
    """What `to_files` wrote. Raises `StoreCorrupt` when it cannot be read."""
    try:
        return TrainerState(load_file(files[TENSORS_FILE]), json.loads(files[META_FILE].read_bytes()))
    except (KeyError, ValueError, OSError) as error:
        raise StoreCorrupt(
            f"the trainer state in {[str(path) for path in files.values()]} is unreadable: {error}"
        ) from error


def capture_state(
    modules: list[LoraModule], optimizer: torch.optim.Optimizer | None, scheduler: Any, extra: Mapping[str, Any]
) -> TrainerState:
    """Copy a trainer's state to the CPU. `extra` is the caller's own, JSON; `ConfigError` for what is none."""
    tensors = {name: _copied(parameter) for name, parameter in _weights(modules)}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    scalars: dict[str, dict[str, Any]] = {}
    groups = None
    if optimizer is not None:
        saved = optimizer.state_dict()
        groups = saved["param_groups"]
        for index, values in saved["state"].items():
            scalars[str(index)] = {name: value for name, value in values.items() if not torch.is_tensor(value)}
            for name, value in values.items():
                if torch.is_tensor(value):
                    tensors[f"optimizer/{index}/{name}"] = _copied(value)
    meta = {
        "param_groups": groups,
        "optimizer_scalars": scalars,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": dict(extra),
    }
    try:
        return TrainerState(tensors, json.loads(json.dumps(meta)))
    except TypeError as error:
        raise ConfigError(
            f"the state of {type(optimizer).__name__}, {type(scheduler).__name__} or extra= holds more than tensors, "
            f"numbers and text, and nothing is pickled here: {error}"
        ) from error


def check_state(state: TrainerState, modules: list[LoraModule]) -> None:
    """Raises `StoreCorrupt` unless the state holds exactly these modules' weights, in their shapes."""
    expected = {name: tuple(parameter.shape) for name, parameter in _weights(modules)}
    found = {name: tuple(t.shape) for name, t in state.tensors.items() if name.startswith("weights/")}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise StoreCorrupt(f"the trainer state has {odd} as {found.get(odd)}, the model as {expected.get(odd)}")


def restore_state(
    state: TrainerState, modules: list[LoraModule], optimizer: torch.optim.Optimizer | None, scheduler: Any
) -> None:
    """Put weights, optimizer, scheduler and random state back as they were; what the state lacks is left alone."""
    check_state(state, modules)
    with torch.no_grad():
        for name, parameter in _weights(modules):
            parameter.copy_(state.tensors[name])
    if optimizer is not None and state.has_optimizer:
        optimizer.load_state_dict({"state": _optimizer_entries(state), "param_groups": state.meta["param_groups"]})
    if scheduler is not None and state.has_scheduler:
        scheduler.load_state_dict(dict(state.meta["scheduler"]))
    torch.set_rng_state(state.tensors["rng/cpu"])
    if "rng/cuda" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["rng/cuda"])


def scale_learning_rate(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate by `factor`, now and in everything the schedule does with it later.

    Both `state_dict`s hold the change, so it survives being saved and restored.
    """
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    if scheduler is not None:
        for name in ("base_lrs", "_last_lr"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])


def _optimizer_entries(state: TrainerState) -> dict[int, dict[str, Any]]:
    entries = {int(index): dict(scalars) for index, scalars in state.meta["optimizer_scalars"].items()}
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer/"):
            _, index, field = name.split("/", 2)
            entries[int(index)][field] = tensor.clone()
    return entries


def _weights(modules: list[LoraModule]) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"weights/{module.path}.{kind}", parameter)
        for module in modules
        for kind, parameter in (("A", module.a_RI), ("B", module.b_OR))
    ]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
