"""What is kept of a trainer comes back as it was, through files and without pickle."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch.optim import lr_scheduler as schedules

from lora_grpo.errors import ConfigError
from lora_grpo.grpo.processes import Processes
from lora_grpo.state import TrainerState, Training, capture_state, read_state, restore_state

UPDATES = 12


def training(schedule: Callable[[Any], Any]) -> Training:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    return Training(torch.nn.Linear(1, 1), [], optimizer, schedule(optimizer), Processes(None))


def rates(live: Training, updates: int) -> list[float]:
    """The learning rate after each of so many updates."""
    found = []
    for _ in range(updates):
        live.optimizer.step()  # type: ignore[union-attr]
        plateau = isinstance(live.scheduler, schedules.ReduceLROnPlateau)
        live.scheduler.step(*([1.0] if plateau else []))
        found.append(live.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
    return found


def through_files(state: TrainerState, folder: Path) -> TrainerState:
    files, meta = state.to_files()
    for name, buffers in files.items():
        (folder / name).write_bytes(b"".join(buffers))
    (folder / "state.json").write_text(json.dumps(meta))
    return read_state({name: folder / name for name in [*files, "state.json"]})


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "MultiStepLR": lambda optimizer: schedules.MultiStepLR(optimizer, [3, 5, 5, 9], 0.1),
    "OneCycleLR": lambda optimizer: schedules.OneCycleLR(optimizer, 1.0, total_steps=20),
    "ReduceLROnPlateau": lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=2),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 3),
    "LambdaLR": lambda optimizer: schedules.LambdaLR(optimizer, lambda epoch: 1 / (epoch + 1)),
    "SequentialLR": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [schedules.ConstantLR(optimizer, 0.5, 2), schedules.MultiStepLR(optimizer, [3, 6])],
        [2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_a_restored_schedule_goes_on_as_the_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    """In the same process, as after a rollback (or a failed one), and in another, as after a resume."""
    whole = rates(training(SCHEDULES[name]), UPDATES)
    same, other = training(SCHEDULES[name]), training(SCHEDULES[name])
    assert rates(same, 2) == whole[:2]
    state = capture_state(same, {})
    assert rates(same, 3) == whole[2:5]
    restore_state(state, same)
    assert rates(same, UPDATES - 2) == whole[2:]
    restore_state(through_files(state, tmp_path), other)
    assert rates(other, UPDATES - 2) == whole[2:]


class Odd:
    """A schedule whose state holds whatever a schedule's state may hold."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def test_no_type_is_changed_on_the_way(tmp_path: Path) -> None:
    values = {
        "milestones": Counter({3: 2, 5: 1}),
        "alike": {1: torch.tensor(1.0), "1": torch.tensor(2.0)},
        "by_epoch": {0: 0.5, 10: {"rate": 0.1}},
        "betas": (0.9, 0.999),
        "spans": [((0, 1), [2, None, True]), {}],
        "$dict": {"$tuple": 1},
        "best": math.inf,
    }
    live = training(lambda optimizer: Odd(**values))
    restore_state(through_files(capture_state(live, {}), tmp_path), live)
    assert live.scheduler.values == values
    assert type(live.scheduler.values["milestones"]) is Counter
    assert type(live.scheduler.values["spans"][0]) is tuple
    assert type(live.optimizer.param_groups[0]["betas"]) is tuple  # type: ignore[union-attr]


def test_a_learning_rate_that_is_a_tensor_comes_back_as_one(tmp_path: Path) -> None:
    """As a compiled optimizer needs it, so that a schedule does not compile it anew."""
    live = training(lambda optimizer: Odd())
    group = live.optimizer.param_groups[0]  # type: ignore[union-attr]
    group["lr"] = torch.tensor(0.3)
    state = through_files(capture_state(live, {}), tmp_path)
    group["lr"].fill_(0.1)
    restore_state(state, live)
    back = live.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
    assert (back.dtype, back) == (torch.float32, torch.tensor(0.3))


def test_an_optimizer_of_other_groups_takes_no_state() -> None:
    live = training(lambda optimizer: Odd(value=1))
    state = capture_state(live, {})
    live.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})  # type: ignore[union-attr]
    live.scheduler.values = {"value": 2}
    with pytest.raises(ConfigError, match=r"has groups of \[1, 1\] parameters, and of \[1\] when this state was kept"):
        restore_state(state, live)
    assert live.scheduler.values == {"value": 2}


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion"])
def test_moments_of_bitsandbytes_come_back_to_the_bit(name: str, tmp_path: Path) -> None:
    """It keeps them in a dict inside each parameter's state; 8-bit ones with the scale of each block."""
    kind = getattr(pytest.importorskip("bitsandbytes").optim, name)

    def live() -> Training:
        torch.manual_seed(0)
        large, small = torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(3))
        return Training(torch.nn.Linear(1, 1), [], kind([large, small], lr=0.1), None, Processes(None))

    def stepped(training: Training, times: int) -> list[torch.Tensor]:
        optimizer: Any = training.optimizer
        parameters = optimizer.param_groups[0]["params"]
        for number in range(times):
            for parameter in parameters:
                parameter.grad = (parameter.detach() + number).sin()
            optimizer.step()
        return [parameter.detach().clone() for parameter in parameters]

    def from_there(training: Training) -> list[torch.Tensor]:
        optimizer: Any = training.optimizer
        for parameter, then in zip(optimizer.param_groups[0]["params"], weights, strict=True):
            parameter.data.copy_(then)
        return stepped(training, 3)

    first = live()
    weights = stepped(first, 3)
    state = capture_state(first, {})
    expected = stepped(first, 3)
    restore_state(state, first)
    assert all(map(torch.equal, from_there(first), expected))
    other = live()
    restore_state(through_files(state, tmp_path), other)
    assert all(map(torch.equal, from_there(other), expected))


def test_what_was_captured_is_not_the_live_object() -> None:
    values: dict[str, Any] = {"milestones": Counter({3: 1})}
    live = training(lambda optimizer: Odd(**values))
    state = capture_state(live, {})
    values["milestones"][3] = 9
    restore_state(state, live)
    live.scheduler.values["milestones"][3] = 8
    restore_state(state, live)
    assert live.scheduler.values == {"milestones": Counter({3: 1})}


def test_what_only_pickle_could_keep_is_refused() -> None:
    live = training(lambda optimizer: Odd(function=lambda: 0))
    wrapped: Any = SimpleNamespace(optimizer=live.optimizer, state_dict=live.optimizer.state_dict)  # type: ignore[union-attr]
    live = replace(live, optimizer=wrapped)  # as accelerate wraps it
    with pytest.raises(ConfigError, match=r"the state of AdamW, of the schedule .* nothing is pickled"):
        capture_state(live, {})


class Packed(torch.Tensor):
    """As torchao's 8-bit moments, whose values lie in other tensors."""


def test_moments_without_a_storage_of_their_own_are_refused() -> None:
    live = training(lambda optimizer: Odd())
    optimizer: Any = live.optimizer
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"exp_avg": torch.zeros(2).as_subclass(Packed)}
    with pytest.raises(ConfigError, match=r"the state of AdamW, .*Object of type Packed is not JSON"):
        capture_state(live, {})


def test_the_callers_own_stays_plain_json() -> None:
    state = capture_state(training(lambda optimizer: Odd()), {"sampler": {"position": 3}, "steps_done": 2})
    files, meta = state.to_files()
    assert meta["extra"] == {"sampler": {"position": 3}, "steps_done": 2}
    assert "rng/cpu" in load(b"".join(files["state.safetensors"]))
