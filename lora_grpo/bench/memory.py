"""What trainer, engine and a sync take: resident on the CPU, CUDA allocated and reserved on a GPU, tmpfs on both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lora_grpo.bench.gauges import TMPFS, collect, level, on_tmpfs, proc_bytes, settled_level
from lora_grpo.bench.plan import Cell, Settings, Subject, alone

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy

SYNCS = 5
KV_CACHE_BYTES = 3 << 30
"""Of every engine on a GPU: room for 64 rows of 512 tokens of the 7B shape."""


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    return [alone("memory", measure, subject.with_strategy(name), fresh=True) for name in settings.strategies]


def measure(strategy: Strategy) -> list[dict[str, Any]]:
    """Worker: the levels on the way here, the peak over some syncs, and what the weights took, which are gone then."""
    device, levels = strategy.subject.device, strategy.levels
    forget_peaks(device)
    for _ in range(SYNCS):
        strategy.renew()
    most, reserved = peak(device)
    copy_bytes = strategy.trainer.base_bytes
    tmpfs = on_tmpfs(strategy.folder)
    # `level` counts mapped version files on the CPU; here they count once, as tmpfs.
    mapped = _mapped(strategy.folder) if device == "cpu" else 0
    before = settled_level(device)
    strategy.drop_base()
    row = {
        "kind": "resident" if device == "cpu" else "cuda",
        "before_bytes": levels.start,
        "trainer_bytes": levels.grown["trainer"],
        "engine_bytes": levels.grown["engine"],
        "sync_bytes": max(0, most - levels.last - mapped),
        "tmpfs_bytes": tmpfs,
        "peak_bytes": most - levels.start - mapped + tmpfs,
        "reserved_peak_bytes": reserved,
        "copy_bytes": copy_bytes,
        "weights_bytes": before - settled_level(device),
    }
    return [row]


def give_back(strategy: Strategy) -> None:
    """Worker: what garbage and torch's cache still hold of a GPU goes back to it, for whoever measures next there."""
    collect(strategy.subject.device)


def forget_peaks(device: str) -> None:
    """From now on `peak` counts anew."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5 resets the peak resident set of this process (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> tuple[int, int | None]:
    """Bytes at most since the peaks were forgotten, and CUDA's reserved."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)), int(torch.cuda.max_memory_reserved(device))
    resident, most = proc_bytes("self/status", "VmRSS", "VmHWM")
    # Both of these the kernel counts roughly, in the same way; what is in memory now it can count page by page.
    return level(device) + most - resident, None


def _mapped(folder: Path) -> int:
    maps = psutil.Process().memory_maps() if folder.is_relative_to(TMPFS) else ()
    return sum(one.rss for one in maps if Path(one.path).is_relative_to(folder))
