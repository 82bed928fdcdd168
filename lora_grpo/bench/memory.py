"""What trainer, engine and a sync take: PSS on the CPU, CUDA allocated and reserved on a GPU, tmpfs on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from lora_grpo.bench.levels import collect, is_cuda, level, on_tmpfs, proc_bytes, settled_level, tmpfs_folders
from lora_grpo.bench.plan import Cell, Subject
from lora_grpo.bench.prepared import Bench
from lora_grpo.bench.schema import MemoryRow
from lora_grpo.bench.settings import Settings
from lora_grpo.bench.strategies import NATIVE

SYNCS = 5
KV_CACHE_BYTES = 3 << 30
"""Of every engine on a GPU: room for 64 rows of 512 tokens of the 7B shape."""


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """One fresh process a strategy."""
    return [
        Cell(f"memory/{name}", "memory", measure, (subject.with_strategy(name),), fresh=True)
        for name in settings.strategies
    ]


def measure(bench: Bench) -> dict[str, Any]:
    """Worker: the levels on the way here, the peak over some syncs, and what the base's weights took; the last thing
    that can be done with them."""
    device, levels = bench.subject.device, bench.levels
    forget_peaks(device)
    for _ in range(SYNCS):
        bench.strategy.renew()
    most, reserved = peak(device)
    copy_bytes = bench.strategy.trainer.base_bytes
    tmpfs = on_tmpfs(bench.strategy.files)
    # `level` counts mapped version files on the CPU; here they count once, as tmpfs.
    mapped = 0 if is_cuda(device) else _mapped(tmpfs_folders(bench.strategy.files))
    return {
        "kind": "cuda" if is_cuda(device) else "pss",
        "before_bytes": levels.start,
        "trainer_bytes": levels.grown["trainer"],
        "engine_bytes": levels.grown["engine"],
        "sync_bytes": max(0, most - levels.last - mapped),
        "tmpfs_bytes": tmpfs,
        "peak_bytes": most - levels.start - mapped + tmpfs,
        "reserved_peak_bytes": reserved,
        "copy_bytes": copy_bytes,
        "weights_bytes": _weights(bench),
    }


def _weights(bench: Bench) -> int:
    """Bytes that go when trainer and engine let go of the base."""
    before = settled_level(bench.subject.device)
    bench.strategy.drop_base()
    return before - settled_level(bench.subject.device)


def give_back(bench: Bench) -> None:
    """Worker: what garbage and torch's cache still hold of a GPU goes back to it, for whoever measures next there."""
    collect(bench.subject.device)


def rows(cell: Mapping[str, Any], bandwidth: object) -> list[MemoryRow]:
    (done,) = cell["rounds"]
    return [MemoryRow(strategy=done["strategy"], **cell["labels"], **done["result"])]


def with_ratios(made: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Rows with their peaks compared with native's."""
    native = {row.shape: row.peak_bytes for row in made if row.strategy == NATIVE}
    return [
        row.model_copy(update={"ratio_to_native": row.peak_bytes / native[row.shape]}) if row.shape in native else row
        for row in made
    ]


def forget_peaks(device: str) -> None:
    """From now on `peak` counts anew."""
    if is_cuda(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5 resets the peak resident set of this process (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> tuple[int, int | None]:
    """Bytes at most since the peaks were forgotten, and CUDA's reserved."""
    if is_cuda(device):
        import torch

        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)), int(torch.cuda.max_memory_reserved(device))
    resident, most = proc_bytes("self/status", "VmRSS", "VmHWM")
    # The kernel keeps a peak of the resident set only; what is shared of it now was shared then.
    return level(device) + most - resident, None


def _mapped(folders: list[Path]) -> int:
    """Bytes of files in `folders` that are mapped into this process."""
    maps = psutil.Process().memory_maps()
    return sum(one.pss for one in maps if any(Path(one.path).is_relative_to(folder) for folder in folders))
