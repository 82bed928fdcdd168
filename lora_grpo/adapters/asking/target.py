"""Naming a version: one grammar for the command line, the store and everything that takes a version."""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any, Protocol, TypeAlias

from lora_grpo.adapters.upkeep.retention import is_score
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError, UnknownVersion

Target: TypeAlias = int | str | AdapterVersion
"""A version, its number (12, "12" or "v12"), "head", "parent" (the one that `HEAD` was made from), "best" (by held-out
reward where it was measured, else by reward), or "best:METRIC" ("best:-METRIC" is the lowest)."""

WAYS = "a number (12 or v12), 'head', 'parent', 'best', 'best:METRIC' or 'best:-METRIC' (the lowest)"
_NUMBER = re.compile("[vV]?([0-9]{1,18})")
_WORDS = ("head", "parent", "best")


class Recorded(Protocol):
    """Where a name is looked up."""

    @property
    def head(self) -> AdapterVersion | None: ...

    def list(self) -> list[AdapterVersion]: ...

    def metrics(self, version: Target) -> dict[str, Any]: ...


def parse_target(to: object) -> Target:
    """A target as it was meant, numbers as numbers. Raises `ConfigError` for what cannot name a version."""
    if isinstance(to, AdapterVersion):
        return to
    if not isinstance(to, bool) and isinstance(to, Integral):
        return int(to)
    if isinstance(to, str):
        if number := _NUMBER.fullmatch(to):
            return int(number[1])
        if to.lower() in _WORDS:
            return to.lower()
        if to[:5].lower() == "best:" and to[5:].removeprefix("-"):
            return f"best:{to[5:]}"
    raise ConfigError(f"{to!r} names no version; use {WAYS}, or an AdapterVersion")


def number_of(store: Recorded, to: Target) -> int:
    """The number of the version that `to` names, kept or not.

    Raises `ConfigError` for what cannot name a version, `UnknownVersion` with what there is to choose from.
    """
    parsed = parse_target(to)
    if isinstance(parsed, AdapterVersion):
        return parsed.number
    if isinstance(parsed, int):
        return parsed
    if parsed in ("head", "parent"):
        return _in_line(store, parsed)
    return _best(store, best_metric(store) if parsed == "best" else parsed.removeprefix("best:"))


def best_metric(store: Recorded) -> str:
    """What "best" goes by: the held-out reward where a kept version has one, else the reward."""
    held_out = "eval/reward"
    measured = any(is_score(store.metrics(version.number).get(held_out)) for version in store.list())
    return held_out if measured else "reward"


def _in_line(store: Recorded, word: str) -> int:
    head = store.head
    if head is None:
        raise UnknownVersion(f"nothing was promoted yet: there is no version that is {word!r}")
    if word == "head":
        return head.number
    if head.parent is None:
        raise UnknownVersion(f"{head} has no parent: it was the first; name a version by its number")
    return head.parent


def _best(store: Recorded, metric: str) -> int:
    """The version that made the best completions; of equals the newest, as in retention."""
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    metrics = {version.number: store.metrics(version.number) for version in store.list()}
    scores = {number: sign * values[name] for number, values in metrics.items() if is_score(values.get(name))}
    if not scores:
        known = sorted({key for values in metrics.values() for key, value in values.items() if is_score(value)})
        raise UnknownVersion(
            f"no kept version has a recorded {name!r}; recorded are: {', '.join(known) or 'none'}: record it with "
            f"store.record(version, **{{{name!r}: 0.5}}), name another as 'best:METRIC', or a version by its number"
        )
    return max(scores, key=lambda number: (scores[number], number))
