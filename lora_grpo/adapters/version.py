"""`AdapterVersion`, the names of its files, and what it is called: in its store a `Target`, over HTTP `RUN@NUMBER`."""

import operator
import re
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

from lora_grpo.errors import ConfigError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE)
MANIFEST_FILE = "version.json"
STATE_TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One published adapter; never changes after it is published.

    `number` counts from 1 and is never reused, not even after pruning. `parent` is the version that training went
    on from (None for the first). `path` is an immutable PEFT directory for as long as the version is kept.
    `digest` covers every byte of the two PEFT files. `step` is the caller's training step. `created_at` is seconds
    since the epoch.

    >>> version = store.get("head")
    >>> print(version, version.parent, (version.path / "adapter_config.json").is_file())
    v2 1 True
    """

    number: int
    parent: int | None
    path: Path
    digest: str
    step: int
    created_at: float

    def __str__(self) -> str:
        return f"v{self.number}"


Target: TypeAlias = int | str | AdapterVersion
"""A version, its number (12, "12" or "v12"), "head", "parent" (the one that `HEAD` was made from), "best" (by held-out
reward where it was measured, else by reward), or "best:METRIC" ("best:-METRIC" is the lowest)."""

WAYS = "a number (12 or v12), 'head', 'parent', 'best', 'best:METRIC' or 'best:-METRIC' (the lowest)"
_NUMBER = re.compile("[vV]?([0-9]{1,18})")


def parse_target(to: object) -> Target:
    """A target as it was meant, numbers as numbers. Raises `ConfigError` for what cannot name a version."""
    if isinstance(to, AdapterVersion):
        return to
    if not isinstance(to, bool) and isinstance(to, Integral):
        return int(to)
    if isinstance(to, str):
        if number := _NUMBER.fullmatch(to):
            return int(number[1])
        if to.lower() in ("head", "parent", "best"):
            return to.lower()
        if to[:5].lower() == "best:" and to[5:].removeprefix("-"):
            return f"best:{to[5:]}"
    raise ConfigError(f"{to!r} names no version; use {WAYS}, or an AdapterVersion")


def as_step(step: Any) -> int:
    with suppress(TypeError):
        if (whole := operator.index(step)) >= 0:
            return whole
    raise ConfigError(f"step={step!r} must be a whole number, 0 or more")


_SERVED = re.compile("([A-Za-z0-9][A-Za-z0-9._-]{0,127})@([1-9][0-9]{0,8})")


def run_name(folder: Path, run_id: str) -> str:
    """Its folder's name, for people, and the start of its id: a server remembers names for life, and a run begun again
    in a folder of the same name must not be answered from the weights of the one before it."""
    legible = re.sub("[^A-Za-z0-9._-]+", "-", folder.name).strip("-._")[:64] or "run"
    return f"{legible}-{run_id[:8]}"


def served_name(run: str, number: int) -> str:
    return f"{run}@{number}"


def parse_served_name(name: str) -> tuple[str, int] | None:
    return (match[1], int(match[2])) if (match := _SERVED.fullmatch(name)) else None
