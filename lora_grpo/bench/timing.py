"""Seconds by phase, with what is queued on the device waited for at both ends; and how fast bytes can cross at all, on
this machine, now: what no sync can beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy
import torch

_BYTES = 64 << 20
_REPEATS = 20


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


def percentile_95(values: Sequence[float]) -> float:
    """Linear between the two nearest values."""
    return float(numpy.percentile(values, 95))


def measure_bandwidth(device: str) -> dict[str, float]:
    """Bytes a second by channel, the best of several: `host_copy` in memory; on a GPU also `device_copy` on it, and
    `to_host` and `to_device` over the bus, pinned."""
    host = torch.empty(_BYTES, dtype=torch.uint8)
    other = torch.zeros_like(host)
    channels = {"host_copy": _best(device, lambda: other.copy_(host))}
    if torch.device(device).type == "cuda":
        near, near2 = torch.zeros(2, _BYTES, dtype=torch.uint8, device=device)
        pinned = host.pin_memory()
        channels["device_copy"] = _best(device, lambda: near2.copy_(near))
        channels["to_host"] = _best(device, lambda: pinned.copy_(near, non_blocking=True))
        channels["to_device"] = _best(device, lambda: near.copy_(pinned, non_blocking=True))
    return channels


def adapter_crossing(device: str, nbytes: int) -> dict[str, int]:
    """What an adapter must cross at the very least: memory once, or the bus to the host and back."""
    return {"host_copy": nbytes} if device == "cpu" else {"to_host": nbytes, "to_device": nbytes}


def weights_crossing(device: str, nbytes: int) -> dict[str, int]:
    """What weights cross: trainer and engine are on one device."""
    return {"host_copy" if device == "cpu" else "device_copy": nbytes}


def floor_seconds(moved_bytes: Mapping[str, int], bandwidth: Mapping[str, float]) -> float:
    """The least time that bytes by channel can take."""
    return sum(nbytes / bandwidth[channel] for channel, nbytes in moved_bytes.items())


def _best(device: str, copy: Callable[[], object]) -> float:
    clock = Clock(device)
    copy()
    fastest = float("inf")
    for _ in range(_REPEATS):
        started = clock.now()
        copy()
        fastest = min(fastest, clock.now() - started)
    return _BYTES / fastest
