"""What a process takes now: PSS on the CPU, CUDA allocated on a GPU, blocks of files on tmpfs."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

TMPFS = "/dev/shm"


class Levels:
    """What a process grew by, step by step."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.start = self.last = settled_level(device)
        self.grown: dict[str, int] = {}

    def seen(self, part: str) -> None:
        """Whatever was taken since the last call belongs to `part`."""
        now = level(self._device)
        self.grown[part] = self.grown.get(part, 0) + now - self.last
        self.last = now


def collect(device: str) -> None:
    """Let go of garbage, and on a GPU of what torch's cache holds."""
    if device != "cpu":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def settled_level(device: str) -> int:
    """`level` without garbage, and without what glibc keeps of freed memory for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return level(device)


def level(device: str) -> int:
    """Bytes in use now: CUDA allocated, or this process's proportional set."""
    allocated = cuda_level(device)
    return resident() if allocated is None else allocated


def cuda_level(device: str) -> int | None:
    """Bytes that torch has allocated on a GPU now; None on the CPU."""
    if device == "cpu":
        return None
    import torch

    torch.cuda.synchronize(device)
    return int(torch.cuda.memory_allocated(device))


def resident() -> int:
    """This process's proportional set now, bytes."""
    return proc_bytes("self/smaps_rollup", "Pss")[0]


def proc_bytes(file: str, *names: str) -> list[int]:
    """What lines such as `VmHWM:   1024 kB` of a file in /proc say, by their names."""
    lines = dict(line.split(":", 1) for line in Path("/proc", file).read_text().splitlines() if ":" in line)
    return [int(lines[name].split()[0]) << 10 for name in names]


def on_tmpfs(folder: Path) -> int:
    """Bytes that the files of a folder take on tmpfs; none if it is elsewhere."""
    files = folder.rglob("*") if folder.is_relative_to(TMPFS) else ()
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())
