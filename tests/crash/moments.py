"""Moments between two steps of a store's work, at which a test does something, or dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from lora_grpo.adapters import store
from lora_grpo.adapters.upkeep import archive

MOMENTS = {"archive.copied": (archive, "_copy_checked"), "promote.renamed": (store, "link_head")}
"""By name: a version's files lie in the archive's staging folder; `HEAD` points to another version."""


def at(moment: str, act: Callable[[int], object]) -> None:
    """From now on, in this process: `act` is called each time that it comes by `moment`, with how often it has."""
    owner, name = MOMENTS[moment]
    real, hits = getattr(owner, name), [0]

    def passing(*given: Any, **named: Any) -> Any:
        result = real(*given, **named)
        hits[0] += 1
        act(hits[0])
        return result

    setattr(owner, name, passing)


def die_at(moment: str, hit: int = 1) -> None:
    """This process is killed when it comes by `moment` for the `hit`-th time."""
    at(moment, lambda hits: os.kill(os.getpid(), signal.SIGKILL) if hits == hit else None)
