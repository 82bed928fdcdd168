"""Calling reward functions on groups of completions.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, sync or async, B values for B
rows; None says that it does not apply to the row. For text prompts the completions are strings, for chats they are
`[{"role": "assistant", "content": text}]`. It also gets `completion_ids`, `trainer_state`, `log_extra` and
`log_metric`; one that takes no `**kwargs` gets what it names.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lora_grpo.errors import ConfigError, LoraGrpoError, RewardError
from lora_grpo.rewards.background import run_in_background
from lora_grpo.types import Completion, Group, Prompt

logger = logging.getLogger(__name__)

RewardFunction: TypeAlias = Callable[..., Any]
Kwargs: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What reward functions can know of the run, under TRL's names."""

    global_step: int = 0
    max_steps: int = 0


@dataclass(slots=True)
class RewardContext:
    """The run's state as given to reward functions, and what they logged.

    `extra` holds columns of B values for the shown samples, `logged` each value given to `log_metric`.
    """

    state: TrainerState = TrainerState()
    extra: dict[str, list[Any]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra[column] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        self.logged.setdefault(name, []).append(float(value))

    def metrics(self) -> dict[str, float]:
        """The mean of each logged metric."""
        return {name: sum(values) / len(values) for name, values in self.logged.items()}


def reward_names(functions: Sequence[RewardFunction]) -> list[str]:
    """A name a function, each once: a second 'regex' is 'regex_2'."""
    names: list[str] = []
    for function in functions:
        name = _name(function)
        repeats = sum(_name(other) == name for other in functions[: len(names)])
        names.append(f"{name}_{repeats + 1}" if repeats else name)
    return names


def check_columns(functions: Sequence[RewardFunction], column_names: Iterable[str]) -> None:
    """Refuses, before the first step, a function that asks for a column that the data lack."""
    known = set(column_names)
    for name, function in zip(reward_names(functions), functions, strict=True):
        for column in _required(function):
            if column not in known and column not in _STANDARD:
                raise ConfigError(
                    f"reward {name!r} asks for column {column!r}, which the data lack; "
                    f"their columns are {sorted(known)}: name the right one, or give the parameter a default"
                )


def score(
    functions: Sequence[RewardFunction],
    groups: Sequence[Group],
    columns: Mapping[str, Sequence[Any]],
    context: RewardContext | None = None,
) -> list[list[float]]:
    """`rewards_BF`: a row a completion, in the groups' order, and in it a value a function; None becomes NaN.

    `columns` hold P values, one a group. Async functions run at the same time as each other and as the others.
    Raises `RewardError` naming the function and the prompt when one fails or returns other than B finite numbers.
    """
    context = context or RewardContext()
    names = reward_names(functions)
    inputs = _inputs(groups, columns)
    calls = [_Call(name, function, inputs, context) for name, function in zip(names, functions, strict=True)]
    try:
        for call in calls:
            call.start()
        values_FB = [call.finish() for call in calls]
    finally:
        for call in calls:
            call.cancel()
    rewards_BF = [list(row) for row in zip(*values_FB, strict=True)]
    _warn_of_unscored(rewards_BF, inputs)
    return rewards_BF


class _Call:
    """One function's call on one batch."""

    def __init__(self, name: str, function: RewardFunction, inputs: Kwargs, context: RewardContext) -> None:
        self.name = name
        self.function = function
        self.inputs = inputs
        self.context = context
        self._future: Future[Any] | None = None

    def start(self) -> None:
        """An async function begins; a sync one waits for `finish`."""
        if _is_async(self.function):
            self._future = run_in_background(self.function(**self._kwargs(self.inputs, self.context)))

    def finish(self) -> list[float]:
        try:
            values = self._future.result() if self._future else self._run(self.inputs, self.context)
        except LoraGrpoError:
            raise
        except Exception as error:
            raise RewardError(f"reward {self.name!r} raised {_said(error)} {self._locate(error)}") from error
        return self._checked(values)

    def cancel(self) -> None:
        if self._future:
            self._future.cancel()

    def _run(self, inputs: Kwargs, context: RewardContext) -> Any:
        result = self.function(**self._kwargs(inputs, context))
        return run_in_background(result).result() if inspect.isawaitable(result) else result

    def _kwargs(self, inputs: Kwargs, context: RewardContext) -> Kwargs:
        offered = inputs | {
            "trainer_state": context.state,
            "log_extra": context.log_extra,
            "log_metric": context.log_metric,
        }
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return offered
        return {key: value for key, value in offered.items() if key in parameters}

    def _locate(self, error: Exception) -> str:
        """Finds the row by calling again, one row at a time, until the same kind of error comes back."""
        rows = len(self.inputs["prompts"])
        for index in range(rows):
            single = {key: values[index : index + 1] for key, values in self.inputs.items()}
            try:
                self._run(single, RewardContext(self.context.state))
            except Exception as again:  # noqa: BLE001 - whatever the user's function raises
                if type(again) is type(error):
                    return f"for {self._row(index)}"
        return f"for a batch of {rows} rows (each alone passes); the first is {self._row(0)}"

    def _row(self, index: int) -> str:
        return _row(self.inputs, index)

    def _checked(self, values: Any) -> list[float]:
        rows = len(self.inputs["prompts"])
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            raise RewardError(
                f"reward {self.name!r} returned {_short(values)}; it must return a list of {rows} numbers"
            )
        if len(values) != rows:
            raise RewardError(
                f"reward {self.name!r} returned {len(values)} values for {rows} completions; "
                "it must return one for each (None where it does not apply)"
            )
        return [self._number(value, index) for index, value in enumerate(values)]

    def _number(self, value: Any, index: int) -> float:
        if value is None:
            return math.nan
        item = value.item() if hasattr(value, "item") else value
        if not isinstance(item, int | float):
            raise RewardError(f"reward {self.name!r} returned {_short(value)}, no number, for {self._row(index)}")
        if not math.isfinite(item):
            raise RewardError(
                f"reward {self.name!r} returned {item} for {self._row(index)}; "
                "return None where the reward does not apply"
            )
        return float(item)


_STANDARD = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})


def _inputs(groups: Sequence[Group], columns: Mapping[str, Sequence[Any]]) -> Kwargs:
    """The keyword arguments that hold B values each: every prompt's, repeated for its completions."""
    for name, values in columns.items():
        if len(values) != len(groups):
            raise ConfigError(f"column {name!r} has {len(values)} values for {len(groups)} prompts")
    rows = [(index, group, completion) for index, group in enumerate(groups) for completion in group.completions]
    repeated = {name: [values[index] for index, _, _ in rows] for name, values in columns.items()}
    return repeated | {
        "prompts": [group.prompt for _, group, _ in rows],
        "completions": [_as_trl(group.prompt, completion) for _, group, completion in rows],
        "completion_ids": [list(completion.token_ids) for _, _, completion in rows],
    }


def _as_trl(prompt: Prompt, completion: Completion) -> str | list[dict[str, str]]:
    return [{"role": "assistant", "content": completion.text}] if _is_chat(prompt) else completion.text


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_async(function: RewardFunction) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _required(function: RewardFunction) -> list[str]:
    """The columns that a function cannot do without."""
    marked = getattr(function, "columns", ())
    parameters = inspect.signature(function).parameters
    named = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    return [*marked, *named]


def _name(function: RewardFunction) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))


def _warn_of_unscored(rewards_BF: list[list[float]], inputs: Kwargs) -> None:
    unscored = [index for index, row in enumerate(rewards_BF) if all(map(math.isnan, row))]
    if unscored:
        logger.warning(
            "no reward function scored %d of %d completions (all returned None); the first is %s",
            len(unscored),
            len(rewards_BF),
            _row(inputs, unscored[0]),
        )


def _row(inputs: Kwargs, index: int) -> str:
    prompt = inputs["prompts"][index]
    shown = prompt[-1].get("content") if _is_chat(prompt) else prompt
    return f"row {index}: prompt {_short(shown)}, completion {_short(inputs['completions'][index])}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _short(value: object, width: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
