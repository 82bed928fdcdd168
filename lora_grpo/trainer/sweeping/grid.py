"""Which settings a sweep tries: a grid of values, or draws from values and ranges."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_grpo.errors import ConfigError

_NUMBER = r"([-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
_RANGE = re.compile(rf"(log:)?{_NUMBER}\.\.{_NUMBER}")
MAX_TRIALS = 1000
"""More is a typing error rather than a sweep."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One member of a sweep: what it is called, and its overrides such as "grpo.learning_rate=3e-5"."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, random_: random.Random) -> str:
        if self.log:
            value = math.exp(random_.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = random_.uniform(self.low, self.high)
        return str(round(value)) if self.whole else f"{value:.4g}"


def trials_of(swept: Sequence[str], *, sample: int | None = None, seed: int = 0) -> list[Trial]:
    """The trials of "key=1e-5,3e-5" and "key=0,1": every combination, or `sample` draws, the same for each `seed`.

    Draws may also come from a range: "key=0.1..0.9", evenly, or "key=log:1e-6..1e-4", evenly in its logarithm; of
    whole numbers where both ends are. Commas within brackets and quotes separate nothing. Raises `ConfigError`.
    """
    choices = dict(_choices(text) for text in swept)
    if not choices:
        raise ConfigError("a sweep needs a setting with several values, such as grpo.learning_rate=1e-5,3e-5,1e-4")
    if len(choices) < len(swept):
        raise ConfigError(f"{' '.join(swept)} names a setting twice; give all its values at once")
    if sample is None:
        combinations = _grid(choices)
    else:
        if sample < 1:
            raise ConfigError(f"--sample {sample} must be at least 1")
        draw = random.Random(seed)
        combinations = [tuple(_drawn(choices[key], draw) for key in choices) for _ in range(sample)]
    if len(combinations) > MAX_TRIALS:
        raise ConfigError(f"{len(combinations)} members are more than {MAX_TRIALS}; give fewer values, or --sample N")
    width = len(str(len(combinations) - 1))
    return [_trial(f"{number:0{width}d}", tuple(choices), values) for number, values in enumerate(combinations)]


def is_swept(text: str) -> bool:
    """Whether "key=..." names several values or a range, rather than one value for all."""
    values = text.partition("=")[2]
    return _RANGE.fullmatch(values) is not None or len(_split(values)) > 1


def _choices(text: str) -> tuple[str, list[str] | _Range]:
    key, equals, values = text.partition("=")
    if not (equals and key and values):
        raise ConfigError(f"{text!r} is not of the form section.key=value,value")
    span = _RANGE.fullmatch(values)
    return key, _split(values) if span is None else _range(text, *span.groups())


def _range(text: str, log: str | None, low: str, high: str) -> _Range:
    span = _Range(float(low), float(high), log is not None, low.isdigit() and high.isdigit())
    if not (math.isfinite(span.high - span.low) and span.low < span.high and (span.low > 0 or not span.log)):
        raise ConfigError(f"{text!r}: the second number of a range must be larger; with log: both must be above 0")
    return span


def _split(values: str) -> list[str]:
    """At commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in values:
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _grid(choices: dict[str, list[str] | _Range]) -> list[tuple[str, ...]]:
    lists = []
    for key, values in choices.items():
        if isinstance(values, _Range):
            raise ConfigError(f"{key} has a range, but a grid needs single values; add --sample N to draw from it")
        lists.append(values)
    return list(itertools.product(*lists))


def _drawn(values: list[str] | _Range, draw: random.Random) -> str:
    return values.draw(draw) if isinstance(values, _Range) else draw.choice(values)


def _trial(number: str, keys: tuple[str, ...], values: tuple[str, ...]) -> Trial:
    label = "_".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in zip(keys, values, strict=True))
    settings = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return Trial(f"{number}_{label}"[:80], settings)


def _plain(value: str) -> str:
    """A value as a directory's name can hold it."""
    return re.sub(r"[^\w.+-]+", "-", json.dumps(value)[1:-1]).strip("-")
