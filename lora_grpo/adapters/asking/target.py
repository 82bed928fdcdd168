"""Naming a version: one grammar for the command line, the store and everything that takes a version."""

from __future__ import annotations

import re
from numbers import Integral
from typing import TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError

Target: TypeAlias = int | str | AdapterVersion
"""A version, its number (12, "12" or "v12"), "head", "parent" (the one that `HEAD` was made from), "best" (by held-out
reward where it was measured, else by reward), or "best:METRIC" ("best:-METRIC" is the lowest)."""

WAYS = "a number (12 or v12), 'head', 'parent', 'best', 'best:METRIC' or 'best:-METRIC' (the lowest)"
_NUMBER = re.compile("[vV]?([0-9]{1,18})")
_WORDS = ("head", "parent", "best")


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
