"""What all measurements read: a clock that waits for the device, how fast bytes can cross, what a process takes."""

import ctypes
import gc
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
import psutil
import torch

TMPFS = "/dev/shm"
_BYTES, _REPEATS = 64 << 20, 20


class Clock:
    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - started

    def now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def percentile_95(values: Sequence[float]) -> float:
    return float(numpy.percentile(values, 95))


def measure_bandwidth(device: str) -> dict[str, float]:
    """Bytes a second by channel, the best of several; `to_host` and `to_device` over the bus, pinned."""
    host = torch.empty(_BYTES, dtype=torch.uint8)
    other = torch.zeros_like(host)
    channels = {"host_copy": _best(device, lambda: other.copy_(host))}
    if device != "cpu":
        near, near2 = torch.zeros(2, _BYTES, dtype=torch.uint8, device=device)
        pinned = host.pin_memory()
        channels["device_copy"] = _best(device, lambda: near2.copy_(near))
        channels["to_host"] = _best(device, lambda: pinned.copy_(near, non_blocking=True))
        channels["to_device"] = _best(device, lambda: near.copy_(pinned, non_blocking=True))
    return channels


def _best(device: str, copy: Callable[[], object]) -> float:
    copy()
    return _BYTES / min(timeit.repeat(copy, gc.enable, timer=Clock(device).now, number=1, repeat=_REPEATS))


def adapter_crossing(device: str, nbytes: int) -> dict[str, int]:
    """What an adapter must cross at the very least: memory once, or the bus to the host and back."""
    return {"host_copy": nbytes} if device == "cpu" else {"to_host": nbytes, "to_device": nbytes}


def weights_crossing(device: str, nbytes: int) -> dict[str, int]:
    """What weights cross: trainer and engine are on one device."""
    return {"host_copy" if device == "cpu" else "device_copy": nbytes}


def floor_seconds(moved_bytes: Mapping[str, int], bandwidth: Mapping[str, float]) -> float:
    return sum(nbytes / bandwidth[channel] for channel, nbytes in moved_bytes.items())


class Levels:
    def __init__(self, device: str) -> None:
        self._device = device
        self.start = self.last = settled_level(device)
        self.grown: dict[str, int] = {}

    def seen(self, part: str) -> None:
        """What was taken since the last call belongs to `part`."""
        now = level(self._device)
        self.grown[part] = self.grown.get(part, 0) + now - self.last
        self.last = now


def collect(device: str) -> None:
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


def settled_level(device: str) -> int:
    """`level` without garbage, and without what glibc keeps of freed memory for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return level(device)


def level(device: str) -> int:
    allocated = cuda_level(device)
    return resident() if allocated is None else allocated


def cuda_level(device: str) -> int | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def resident() -> int:
    # Not the proportional set: it grows when another process lets go of a library that both had mapped.
    return proc_bytes("self/smaps_rollup", "Rss")[0]


def proc_bytes(file: str, *names: str) -> list[int]:
    """What lines such as `VmHWM:   1024 kB` of a file in /proc say, by their names."""
    lines = dict(line.split(":", 1) for line in Path("/proc", file).read_text().splitlines() if ":" in line)
    return [int(lines[name].split()[0]) << 10 for name in names]


def forget_peaks(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5 resets the peak resident set of this process (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> tuple[int, int | None]:
    """Bytes at most since the peaks were forgotten, and CUDA's reserved."""
    if device != "cpu":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    now, most = proc_bytes("self/status", "VmRSS", "VmHWM")
    # Both of these the kernel counts roughly, in the same way; what is in memory now it can count page by page.
    return level(device) + most - now, None


def on_tmpfs(folder: Path) -> int:
    files = folder.rglob("*") if folder.is_relative_to(TMPFS) else ()
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


def mapped(folder: Path) -> int:
    """Of a folder's files on tmpfs, what this process has in memory."""
    maps = psutil.Process().memory_maps() if folder.is_relative_to(TMPFS) else ()
    return sum(one.rss for one in maps if Path(one.path).is_relative_to(folder))
