"""What trainer, engine and a sync take: PSS on the CPU, CUDA allocated and reserved on a GPU, tmpfs on both."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.plan import Cell, Subject, results_of
from lora_grpo.bench.schema import MemoryRow, Settings
from lora_grpo.bench.strategies import NATIVE

if TYPE_CHECKING:
    from lora_grpo.bench.worker import Bench

SYNCS = 5
KV_CACHE_BYTES = 3 << 30
"""Of every engine on a GPU: room for 64 rows of 512 tokens of the 7B shape."""
MAY_STAY_BYTES = 1 << 29
"""What a strategy that was closed may leave behind in its process for the next one to start there."""
WAIT_S = 5.0


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """One fresh process a strategy; where strategies take turns, what base weights take comes last of each turn."""
    cells = []
    for strategy in settings.strategies:
        one, labels = (subject.with_strategy(strategy),), {"shape": settings.label}
        last = {"drop": not settings.takes_turns}
        cells.append(Cell(f"memory/{strategy}", "memory", "memory:measure", one, last, fresh=True, labels=labels))
        if settings.takes_turns:
            cells.append(Cell(f"weights/{strategy}", "weights", "memory:weights", one, labels=labels))
    return cells


def measure(bench: Bench, drop: bool) -> dict[str, Any]:
    """Worker: the levels on the way here, the peak over some syncs, and with `drop` what the base's weights took."""
    device, levels = bench.subject.device, bench.levels
    _forget_peaks(device)
    for _ in range(SYNCS):
        bench.strategy.renew()
    peak, reserved = _peak(device)
    copy_bytes = bench.strategy.trainer.base_bytes
    tmpfs, mapped = on_tmpfs(bench.strategy.files), _counted_mapped(device, bench.strategy.files)
    return {
        "kind": "cuda" if _is_cuda(device) else "pss",
        "before_bytes": levels.start,
        "trainer_bytes": levels.grown["trainer"],
        "engine_bytes": levels.grown["engine"],
        # Mapped version files are counted once, as tmpfs.
        "sync_bytes": max(0, peak - levels.last - mapped),
        "tmpfs_bytes": tmpfs,
        "peak_bytes": peak - levels.start - mapped + tmpfs,
        "reserved_peak_bytes": reserved,
        "kv_tokens": kv_tokens(bench),
        "copy_bytes": copy_bytes,
        "weights_bytes": weights(bench) if drop else None,
    }


def weights(bench: Bench) -> int:
    """Worker: bytes that go when trainer and engine let go of the base; the last thing that can be done with them."""
    before = _settled_level(bench.subject.device)
    bench.strategy.drop_base()
    return before - _settled_level(bench.subject.device)


class Levels:
    """What a process grew by, step by step."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.start = self.last = level(device)
        self.grown: dict[str, int] = {}

    def seen(self, part: str) -> None:
        """Whatever was taken since the last call belongs to `part`."""
        now = level(self._device)
        self.grown[part] = self.grown.get(part, 0) + now - self.last
        self.last = now


def give_back(bench: Bench) -> None:
    """Worker: what garbage and torch's cache still hold of a GPU goes back to it, for whoever measures next there."""
    collect(bench.subject.device)


def collect(device: str) -> None:
    """Let go of garbage, and on a GPU of what torch's cache holds."""
    if _is_cuda(device):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def taken(device: str) -> int:
    """Bytes in use where trainer and engine are: of a GPU, whoever uses them; on the CPU this process's."""
    if not _is_cuda(device):
        return _settled_level(device)
    import torch

    collect(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def left_behind(device: str, start_bytes: int) -> int:
    """Bytes that are taken beyond a start's, once they have stopped being more than may stay, or `WAIT_S` later."""
    deadline = time.monotonic() + WAIT_S
    while (left := taken(device) - start_bytes) > MAY_STAY_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kv_tokens(bench: Bench) -> int | None:
    """Tokens that fit the KV cache; None on the CPU, where its size is configured and not what is left."""
    return bench.strategy.kv_tokens if _is_cuda(bench.subject.device) else None


def _settled_level(device: str) -> int:
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
    if not _is_cuda(device):
        return None
    import torch

    torch.cuda.synchronize(device)
    return int(torch.cuda.memory_allocated(device))


def resident() -> int:
    """This process's proportional set now, bytes."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss:"))


def rows(cell: Mapping[str, Any], bandwidth: object) -> list[MemoryRow]:
    strategy = cell["order"][0]
    return [MemoryRow(strategy=strategy, **cell["labels"], **results_of(cell, strategy)[0])]


def with_ratios(made: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Rows with their peaks compared with native's."""
    native = {row.shape: row.peak_bytes for row in made if row.strategy == NATIVE}
    return [
        row.model_copy(update={"ratio_to_native": row.peak_bytes / native[row.shape]}) if row.shape in native else row
        for row in made
    ]


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def _forget_peaks(device: str) -> None:
    if _is_cuda(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5 resets the peak resident set of this process (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> tuple[int, int | None]:
    """Bytes at most since the peaks were forgotten, and CUDA's reserved."""
    if _is_cuda(device):
        import torch

        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)), int(torch.cuda.max_memory_reserved(device))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    resident, most = (int(status[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    # The kernel keeps a peak of the resident set only; what is shared of it now was shared then.
    return level(device) + most - resident, None


def on_tmpfs(folders: Iterable[Path]) -> int:
    """Bytes that a strategy's files take on tmpfs."""
    files = [path for folder in _tmpfs_folders(folders) for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files)


def _counted_mapped(device: str, folders: Iterable[Path]) -> int:
    """Bytes of mapped files on tmpfs that `level` counts: CUDA's knows of none."""
    return 0 if _is_cuda(device) else _mapped(_tmpfs_folders(folders))


def _tmpfs_folders(folders: Iterable[Path]) -> list[Path]:
    return [folder for folder in folders if str(folder).startswith("/dev/shm")]


def _mapped(folders: list[Path]) -> int:
    """Bytes of files in `folders` that are mapped into this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and not line.split(" ", 1)[0].endswith(":"):
            inside = any(f" {folder}{os.sep}" in line for folder in folders)
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total
