"""Reward functions: calling them on groups of completions, naming them in a config file, and some ready-made ones.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, sync or async, B values for B
rows; None says that it does not apply to the row. For text prompts the completions are strings, for chats they are
`[{"role": "assistant", "content": text}]`. It also gets `completion_ids`, `trainer_state`, `log_extra` and
`log_metric`; one that takes no `**kwargs` gets what it names. Each factory of a ready-made one returns such a
function that gives 1.0 or 0.0."""

import functools
import importlib
import inspect
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

from lora_grpo.config import RewardConfig
from lora_grpo.data import RESERVED_COLUMNS
from lora_grpo.errors import ConfigError, counted
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.rewards.call import Call, Kwargs, RewardContext, RewardFunction, describe_row, is_chat, place
from lora_grpo.sections import nearest_key
from lora_grpo.types import Group

__all__ = ["RewardContext", "RewardFunction", "check_columns", "completion_text", "exact", "format"]
__all__ += ["load_reward", "numeric", "regex", "reward_names", "score"]

logger = logging.getLogger(__name__)

Reward: TypeAlias = Callable[..., list[float | None]]

# Grouped thousands, plain digits or a bare fraction, then a short exponent. A minus that follows a word or a number is
# a dash or a subtraction, and an exponent of many digits is a model's babble that no number type holds.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212]\$?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
)
_PLAIN = str.maketrans({",": None, "$": None, "\u2212": "-"})


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
        without = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        needed = [p.name for p in without if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        needed = [*getattr(function, "columns", ()), *needed]
        if missing := [column for column in needed if column not in known | RESERVED_COLUMNS]:
            asked = f"reward {name!r} asks for column {missing[0]!r}, but the data have {sorted(known)}"
            raise ConfigError(f"{asked}; name the right one, or give the parameter a default")


def score(
    functions: Sequence[RewardFunction],
    groups: Sequence[Group],
    columns: Mapping[str, Sequence[Any]],
    context: RewardContext | None = None,
    config: GRPOConfig = GRPOConfig(),  # noqa: B008 - frozen
) -> list[list[float]]:
    """`rewards_BF`: a row a completion, in the groups' order, and in it a value a function; None becomes NaN.

    `columns` hold P values, one a group. Async functions run at the same time as each other and as the others.
    After a timeout or a failed connection, which no row is to blame for, the call is made again as `config` says.
    Raises `RewardError` naming the function and the prompt when one fails or returns other than B finite numbers."""
    context = context or RewardContext()
    names = reward_names(functions)
    inputs = _inputs(groups, columns)
    calls = [Call(name, function, inputs, context, config) for name, function in zip(names, functions, strict=True)]
    try:
        for call in calls:
            call.start()
        values_FB = [call.finish() for call in calls]
    finally:
        for call in calls:
            call.cancel()
    rewards_BF = [list(row) for row in zip(*values_FB, strict=True)]
    if unscored := [index for index, row in enumerate(rewards_BF) if all(map(math.isnan, row))]:
        which = f"{len(unscored)} of {len(rewards_BF)} completions (all returned None)"
        logger.warning("no reward function scored %s; the first is %s", which, describe_row(inputs, unscored[0]))
    return rewards_BF


def _inputs(groups: Sequence[Group], columns: Mapping[str, Sequence[Any]]) -> Kwargs:
    """The keyword arguments that hold B values each: every prompt's, repeated for its completions."""
    for name, values in columns.items():
        if len(values) != len(groups):
            told = f"{counted(len(values), 'value')} for {counted(len(groups), 'prompt')}"
            raise ConfigError(f"column {name!r} has {told}")
    rows = [(index, group.prompt, done) for index, group in enumerate(groups) for done in group.completions]
    said = [[{"role": "assistant", "content": done.text}] if is_chat(prompt) else done.text for _, prompt, done in rows]
    ids = [list(done.token_ids) for _, _, done in rows]
    own = {"prompts": [prompt for _, prompt, _ in rows], "completions": said, "completion_ids": ids}
    return {name: [values[index] for index, _, _ in rows] for name, values in columns.items()} | own


# Ready-made rewards, and from a reward's name to its function.


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion as reward functions get it: itself, or the content of a chat's last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part.get("text", "")) for part in content)


def exact(column: str = "answer", ignore_case: bool = False) -> Reward:
    """1.0 where the completion is the text in `column`, whitespace around both left out of account.

    None, which is "does not apply", for rows without an answer."""

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return _ready("exact", lambda text, answer: normal(text) == normal(str(answer)), column)


def numeric(column: str = "answer", tolerance: float = 0.0) -> Reward:
    """1.0 where the completion's last number is the answer's, to within `tolerance`.

    Where a text has GSM8K's '####', the number that follows the last one counts. Numbers are compared as decimals:
    1,200 equals 1200.0. An answer without a number is an error, a completion without one scores 0.0. Rows without an
    answer get None, which is "does not apply"."""
    if not tolerance >= 0:
        raise ConfigError(f"numeric: tolerance={tolerance} must be 0 or more")
    allowed = Decimal(str(tolerance))

    def right(text: str, answer: Any) -> bool:
        wanted, found = final_number(str(answer)), final_number(text)
        if wanted is None:
            raise ValueError(f"column {column!r} holds {answer!r}, which contains no number")
        return found is not None and abs(found - wanted) <= allowed

    return _ready("numeric", right, column)


def regex(pattern: str) -> Reward:
    """1.0 where `pattern` is found anywhere in the completion ('.' also matches a newline)."""
    return _matching("regex", pattern, whole=False)


def format(pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>") -> Reward:
    """1.0 where the whole completion, whitespace around it aside, has the form of `pattern` ('.' matches newlines)."""
    return _matching("format", pattern, whole=True)


def _matching(name: str, pattern: str, *, whole: bool) -> Reward:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{name}: pattern {pattern!r} is not a regular expression: {error}") from error
    return _ready(name, lambda text, _: bool(compiled.fullmatch(text.strip()) if whole else compiled.search(text)))


def _ready(name: str, right: Callable[[str, Any], bool], column: str | None = None) -> Reward:
    """A reward by the completion's text and the answer in `column`, if it takes one; None where there is no answer."""

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if column is not None and column not in columns:  # a run looks before it starts; TRL's trainer does not
            raise ConfigError(f"{name} needs a column {column!r}; the data have {sorted(columns)}")
        answers = [""] * len(completions) if column is None else columns[column]
        pairs = zip(map(completion_text, completions), answers, strict=True)
        return [None if answer is None else float(right(text, answer)) for text, answer in pairs]

    reward.__name__ = reward.__qualname__ = name
    reward.columns = [] if column is None else [column]  # type: ignore[attr-defined]  # a run without is refused early
    return reward


READY: dict[str, Callable[..., Reward]] = {"exact": exact, "numeric": numeric, "regex": regex, "format": format}


def load_reward(config: RewardConfig) -> RewardFunction:
    """The reward function that `config` names, with its options.

    'package.module:function' is imported and gets the options as keyword arguments; any other name is a ready-made
    reward's, whose factory gets them. Raises `ConfigError` naming what is not there and the nearest that is."""
    ready = READY.get(config.name)
    if ready is None and ":" not in config.name:
        near = nearest_key(config.name, READY)
        own = "your own function is named as 'package.module:function'"
        raise ConfigError(f"there is no ready-made reward {config.name!r}; {near} ({own})")
    function = ready or _imported(config.name)
    if not (ready or config.options):
        return function
    signature = inspect.signature(function)
    try:
        (signature.bind if ready else signature.bind_partial)(**config.options)
    except TypeError as error:
        takes = f"it takes {[*signature.parameters]}, each as options.NAME = ..."
        raise ConfigError(f"options of reward {config.name!r}: {error}; {takes}") from error
    return function(**config.options) if ready else functools.partial(function, **config.options)


def _imported(name: str) -> RewardFunction:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        more = place(error)
        if isinstance(error, ModuleNotFoundError):
            more = "; it must be installed or in the current directory"
        elif isinstance(error, SyntaxError):
            more = ""  # its message tells
        said = f"{type(error).__name__}: {error}{more}"
        raise ConfigError(f"reward {name!r}: importing {module_name!r} raised {said}") from error
    function = getattr(module, attribute, None)
    if function is None:
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        known = nearest_key(attribute, callables) if callables else "it defines no function"
        raise ConfigError(f"reward {name!r}: {module_name} has no {attribute!r}; {known}")
    if not callable(function):
        raise ConfigError(f"reward {name!r}: {attribute!r} is {function!r}, which is no function")
    return function


def final_number(text: str) -> Decimal | None:
    """The first number after the last '####' in `text`, or its last number where it has no '####'; None if none."""
    _, marked, tail = text.rpartition("####")
    found = _NUMBER.findall(tail)
    return Decimal(found[0 if marked else -1].translate(_PLAIN)) if found else None
