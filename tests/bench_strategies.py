"""Strategies that are wrong on purpose."""

from __future__ import annotations

import time

from lora_grpo.bench.strategies import Native
from lora_grpo.bench.strategy import Synced

DELAY_S = 0.2


class Slow(Native):
    """The native path with a wait in it."""

    def sync(self) -> Synced:
        started = time.perf_counter()
        time.sleep(DELAY_S)
        waited = time.perf_counter() - started
        synced = super().sync()
        return Synced({**synced.seconds, "wait": waited}, synced.moved_bytes, synced.afterwards_s)


class Broken(Native):
    """Meets an error that is nobody's to translate."""

    def sync(self) -> Synced:
        raise RuntimeError("the seventh layer is missing")


class Stale(Native):
    """Says that it syncs, and does so the first time only."""

    first: Synced | None = None

    def sync(self) -> Synced:
        if self.first is None:
            self.first = super().sync()
        return self.first
