"""What trainer, engine and a sync take: PSS on the CPU, CUDA allocated and reserved on a GPU, tmpfs on both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.plan import Cell, Subject, results_of
from lora_grpo.bench.schema import MemoryRow, Settings
from lora_grpo.bench.strategies import NATIVE

if TYPE_CHECKING:
    from lora_grpo.bench.worker import Bench

SYNCS = 5
KV_CACHE_BYTES = 1 << 30


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """One fresh process a strategy, on a GPU with one KV cache size for all: else each takes what is left."""
    if _is_cuda(settings.device):
        subject = replace(subject, kv_cache_bytes=KV_CACHE_BYTES)
    return [
        Cell(
            f"memory/{strategy}",
            "memory",
            "memory:measure",
            (subject.with_strategy(strategy),),
            fresh=True,
            labels={"shape": settings.label},
        )
        for strategy in settings.strategies
    ]


def measure(bench: Bench) -> dict[str, Any]:
    """Worker: the levels on the way here, and the peak over some syncs."""
    device, levels = bench.subject.device, bench.levels
    _forget_peaks(device)
    for _ in range(SYNCS):
        bench.strategy.trainer.step()
        bench.strategy.sync()
    peak, reserved = _peak(device)
    tmpfs, mapped = _on_tmpfs(bench.strategy.files)
    return {
        "kind": "cuda" if _is_cuda(device) else "pss",
        "trainer_bytes": levels["trainer"] - levels["start"],
        "engine_bytes": levels["engine"] - levels["trainer"],
        # Mapped version files are counted once, as tmpfs.
        "sync_bytes": max(0, peak - levels["engine"] - mapped),
        "tmpfs_bytes": tmpfs,
        "peak_bytes": peak - levels["start"] - mapped + tmpfs,
        "reserved_peak_bytes": reserved,
        "kv_tokens": bench.strategy.kv_tokens,
    }


def level(device: str) -> int:
    """Bytes in use now: CUDA allocated, or this process's proportional set."""
    if _is_cuda(device):
        import torch

        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_allocated(device))
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


def _on_tmpfs(folders: Iterable[Path]) -> tuple[int, int]:
    """Bytes that a strategy's files take on tmpfs, and how many of those are mapped into this process."""
    here = [folder for folder in folders if str(folder).startswith("/dev/shm")]
    files = [path for folder in here for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files), _mapped(here)


def _mapped(folders: list[Path]) -> int:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and not line.split(" ", 1)[0].endswith(":"):
            inside = any(f" {folder}{os.sep}" in line for folder in folders)
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total
