"""Seconds by phase, with everything queued on the device waited for at both ends of a phase."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds by phase."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - started

    def now(self) -> float:
        """Seconds, after all work queued on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile_95(values: Sequence[float]) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    place = 0.95 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
