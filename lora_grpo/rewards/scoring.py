"""Calling reward functions on groups of completions.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, sync or async, B values for B
rows; None says that it does not apply to the row. For text prompts the completions are strings, for chats they are
`[{"role": "assistant", "content": text}]`. It also gets `completion_ids`, `trainer_state`, `log_extra` and
`log_metric`; one that takes no `**kwargs` gets what it names."""

import functools
import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_grpo.data import RESERVED_COLUMNS
from lora_grpo.errors import ConfigError, counted
from lora_grpo.rewards.call import Call, Kwargs, Patience, RewardContext, RewardFunction, describe_row, is_chat
from lora_grpo.types import Group

logger = logging.getLogger(__name__)


def reward_names(functions: Sequence[RewardFunction]) -> list[str]:
    """A name a function, each once: a second 'regex' is 'regex_2'."""
    names, met = list[str](), Counter[str]()
    for function in functions:
        inner = function.func if isinstance(function, functools.partial) else function
        name = str(getattr(inner, "__name__", type(inner).__name__))
        met[name] += 1
        names.append(f"{name}_{met[name]}" if met[name] > 1 else name)
    return names


def check_columns(functions: Sequence[RewardFunction], column_names: Iterable[str]) -> None:
    """Refuses, before the first step, a function that asks for a column that the data lack."""
    known = set(column_names)
    for name, function in zip(reward_names(functions), functions, strict=True):
        if missing := [column for column in _required(function) if column not in known | RESERVED_COLUMNS]:
            asked = f"reward {name!r} asks for column {missing[0]!r}, but the data have {sorted(known)}"
            raise ConfigError(f"{asked}; name the right one, or give the parameter a default")


def score(
    functions: Sequence[RewardFunction],
    groups: Sequence[Group],
    columns: Mapping[str, Sequence[Any]],
    context: RewardContext | None = None,
    patience: Patience = Patience(),  # noqa: B008 - frozen
) -> list[list[float]]:
    """`rewards_BF`: a row a completion, in the groups' order, and in it a value a function; None becomes NaN.

    `columns` hold P values, one a group. Async functions run at the same time as each other and as the others.
    After a timeout or a failed connection, which no row is to blame for, the call is made again as `patience` says.
    Raises `RewardError` naming the function and the prompt when one fails or returns other than B finite numbers."""
    context = context or RewardContext()
    names = reward_names(functions)
    inputs = _inputs(groups, columns)
    calls = [Call(name, function, inputs, context, patience) for name, function in zip(names, functions, strict=True)]
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


def _inputs(groups: Sequence[Group], columns: Mapping[str, Sequence[Any]]) -> Kwargs:
    """The keyword arguments that hold B values each: every prompt's, repeated for its completions."""
    for name, values in columns.items():
        if len(values) != len(groups):
            raise ConfigError(
                f"column {name!r} has {counted(len(values), 'value')} for {counted(len(groups), 'prompt')}"
            )
    rows = [(index, group.prompt, done) for index, group in enumerate(groups) for done in group.completions]
    said = [[{"role": "assistant", "content": done.text}] if is_chat(prompt) else done.text for _, prompt, done in rows]
    return {name: [values[index] for index, _, _ in rows] for name, values in columns.items()} | {
        "prompts": [prompt for _, prompt, _ in rows],
        "completions": said,
        "completion_ids": [list(done.token_ids) for _, _, done in rows],
    }


def _required(function: RewardFunction) -> list[str]:
    """The columns that a function cannot do without."""
    marked = getattr(function, "columns", ())
    parameters = inspect.signature(function).parameters
    without = [p for p in parameters.values() if p.default is p.empty]
    return [*marked, *(p.name for p in without if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))]


def _warn_of_unscored(rewards_BF: list[list[float]], inputs: Kwargs) -> None:
    unscored = [index for index, row in enumerate(rewards_BF) if all(map(math.isnan, row))]
    if unscored:
        which = f"{len(unscored)} of {len(rewards_BF)} completions (all returned None)"
        logger.warning("no reward function scored %s; the first is %s", which, describe_row(inputs, unscored[0]))
