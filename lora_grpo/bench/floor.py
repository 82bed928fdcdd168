"""How fast bytes can cross at all, on this machine, now: what no sync can beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lora_grpo.bench.timing import Clock

_BYTES = 64 << 20
_REPEATS = 20


def measure_bandwidth(device: str) -> dict[str, float]:
    """Bytes a second by channel, the best of several: `host_copy` in memory; on a GPU also `device_copy` on it, and
    `to_host` and `to_device` over the bus, pinned."""
    host = torch.empty(_BYTES, dtype=torch.uint8)
    other = torch.zeros_like(host)
    channels = {"host_copy": _best(device, lambda: other.copy_(host))}
    if torch.device(device).type == "cuda":
        near, near2 = (
            torch.zeros(_BYTES, dtype=torch.uint8, device=device),
            torch.zeros(_BYTES, dtype=torch.uint8, device=device),
        )
        pinned = host.pin_memory()
        channels["device_copy"] = _best(device, lambda: near2.copy_(near))
        channels["to_host"] = _best(device, lambda: pinned.copy_(near, non_blocking=True))
        channels["to_device"] = _best(device, lambda: near.copy_(pinned, non_blocking=True))
    return channels


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
