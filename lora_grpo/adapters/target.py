"""Naming a version to go back to: its number, its place in the line, or what is known of it."""

from __future__ import annotations

from typing import TypeAlias

from lora_grpo.adapters.retention import is_score
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.adapters.view import StoreView
from lora_grpo.errors import ConfigError, UnknownVersion

Target: TypeAlias = int | str
"""A version's number, "parent", or "best:METRIC" (the lowest with "best:-METRIC")."""


def parse_target(text: str) -> Target:
    """What a person typed: "12" and "v12" are numbers. Raises `ConfigError` for what cannot name a version."""
    digits = text.removeprefix("v")
    if digits.isdigit():
        return int(digits)
    if text == "parent" or (text.startswith("best:") and text.removeprefix("best:").removeprefix("-")):
        return text
    raise ConfigError(f"{text!r} names no version; use a number, 'parent', 'best:METRIC' or 'best:-METRIC'")


def resolve(store: StoreView, to: Target) -> AdapterVersion:
    """The version that `to` names. Raises `UnknownVersion` with what there is to choose from."""
    if isinstance(to, int):
        return store.get(to)
    if to == "parent":
        return _parent(store)
    if to.startswith("best:"):
        return _best(store, to.removeprefix("best:"))
    raise UnknownVersion(f"to={to!r} names no version; use a number, 'parent' or 'best:METRIC'")


def _parent(store: StoreView) -> AdapterVersion:
    head = store.head
    if head is None:
        raise UnknownVersion("nothing was promoted yet: there is no version whose parent to go back to")
    if head.parent is None:
        raise UnknownVersion(f"{head} has no parent: it was the first; name a version by its number")
    return store.get(head.parent)


def _best(store: StoreView, metric: str) -> AdapterVersion:
    """The version that made the best completions; of equals the newest, as in retention."""
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    metrics = {version: store.metrics(version.number) for version in store.list()}
    scores = {version: sign * values[name] for version, values in metrics.items() if is_score(values.get(name))}
    if not scores:
        known = sorted({key for values in metrics.values() for key, value in values.items() if is_score(value)})
        raise UnknownVersion(f"no kept version has a recorded {name!r}; recorded are: {', '.join(known) or 'none'}")
    return max(scores, key=lambda version: (scores[version], version.number))
