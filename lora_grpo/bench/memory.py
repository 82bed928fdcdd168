"""What trainer, engine and syncs take: resident on the CPU, CUDA allocated and reserved on a GPU, tmpfs on both.

A file of its own, which imports nothing that a strategy does not: what it did import would count as the syncs'."""

from typing import Any

from lora_grpo.bench.gauges import forget_peaks, mapped, on_tmpfs, peak, settled_level
from lora_grpo.bench.plan import Cell, Settings, Subject, alone
from lora_grpo.bench.strategies.base import Strategy

SYNCS = 5


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    return [alone("memory", "memory", measure, subject, name, fresh=True) for name in settings.strategies]


def measure(strategy: Strategy) -> list[dict[str, Any]]:
    """Worker: the levels on the way here, the peak over some syncs, and what the weights took, which are gone then."""
    device, levels = strategy.subject.device, strategy.levels
    forget_peaks(device)
    for _ in range(SYNCS):
        strategy.renew()
    most, reserved = peak(device)
    copy_bytes = strategy.trainer.base_bytes
    tmpfs = on_tmpfs(strategy.folder)
    # On the CPU the peak counts mapped version files; here they count once, as tmpfs.
    most -= mapped(strategy.folder) if device == "cpu" else 0
    before = settled_level(device)
    strategy.drop_base()
    row = {
        "kind": "resident" if device == "cpu" else "cuda",
        "before_bytes": levels.start,
        "trainer_bytes": levels.grown["trainer"],
        "engine_bytes": levels.grown["engine"],
        "sync_bytes": max(0, most - levels.last),
        "tmpfs_bytes": tmpfs,
        "peak_bytes": most - levels.start + tmpfs,
        "reserved_peak_bytes": reserved,
        "copy_bytes": copy_bytes,
        "weights_bytes": before - settled_level(device),
    }
    return [row]
