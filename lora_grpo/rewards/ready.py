"""Ready-made rewards, and from a reward's name in a config file to its function.

Each factory of a ready-made one returns a function of TRL's signature that gives 1.0 or 0.0."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from traceback import extract_tb
from typing import Any, TypeAlias

from lora_grpo.config import RewardConfig
from lora_grpo.errors import ConfigError
from lora_grpo.rewards.call import RewardFunction
from lora_grpo.sections import nearest_key

Reward: TypeAlias = Callable[..., list[float | None]]

# Grouped thousands, plain digits or a bare fraction, then a short exponent. A minus that follows a word or a number is
# a dash or a subtraction, and an exponent of many digits is a model's babble that no number type holds.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212]\$?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
)
_PLAIN = str.maketrans({",": None, "$": None, "\u2212": "-"})


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

    return _answered("exact", column, lambda text, answer: normal(text) == normal(str(answer)))


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

    return _answered("numeric", column, right)


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

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = map(completion_text, completions)
        return [float(bool(compiled.fullmatch(text.strip()) if whole else compiled.search(text))) for text in texts]

    reward.__name__ = reward.__qualname__ = name
    return reward


def _answered(name: str, column: str, right: Callable[[str, Any], bool]) -> Reward:
    """A reward by the completion's text and the answer in `column`; None where there is no answer."""

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if column not in columns:  # a run looks before it starts; TRL's trainer does not
            raise ConfigError(f"{name} needs a column {column!r}; the data have {sorted(columns)}")
        pairs = zip(map(completion_text, completions), columns[column], strict=True)
        return [None if answer is None else float(right(text, answer)) for text, answer in pairs]

    reward.__name__ = reward.__qualname__ = name
    reward.columns = (column,)  # type: ignore[attr-defined]  # a run without it is refused before its first step
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
    _check_options(config, function)
    return function(**config.options) if ready else functools.partial(function, **config.options)


def _imported(name: str) -> RewardFunction:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        last = extract_tb(error.__traceback__)[-1]
        more = f" ({last.filename}, line {last.lineno})"
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


def _check_options(config: RewardConfig, function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in config.options:
        if option not in parameters and not open_ended:
            raise ConfigError(f"reward {config.name!r} has no option {option!r}; it takes {[*parameters]}")
    for option, parameter in parameters.items() if config.name in READY else ():
        if parameter.default is parameter.empty and option not in config.options:
            raise ConfigError(f"reward {config.name!r} needs the option {option!r}: options.{option} = ...")


def final_number(text: str) -> Decimal | None:
    """The first number after the last '####' in `text`, or its last number where it has no '####'; None if none."""
    _, marked, tail = text.rpartition("####")
    found = _NUMBER.findall(tail)
    return Decimal(found[0 if marked else -1].translate(_PLAIN)) if found else None
