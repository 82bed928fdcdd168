"""Many syncs on one engine: whether time, memory and tmpfs stay where they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.gauges import cuda_level, on_tmpfs, resident
from lora_grpo.bench.plan import Cell, Settings, Subject, alone
from lora_grpo.bench.schema import EnduranceRow, SlopeRow

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy

TENTHS = 10
WARM = 20
"""Syncs thrown away: enough to fill every place that retention then keeps full."""
SAMPLES = 10
"""Looks at the memory in each tenth; each takes as long as a sync."""
_SIZES = ("memory_bytes", "cuda_bytes", "tmpfs_bytes")


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """Each strategy alone: nothing is compared but the first syncs with the last."""
    syncs, rank = settings.endurance_syncs, {"rank": settings.rank}
    how: dict[str, Any] = {"arguments": {"syncs": syncs}, "warm": {"syncs": WARM}, "labels": rank}
    return [alone("endurance", measure, subject.with_strategy(name), **how) for name in settings.strategies]


def measure(strategy: Strategy, syncs: int) -> list[dict[str, Any]]:
    """Worker: seconds of each sync and, every so often, what was resident; in tenths."""
    seconds: list[float] = []
    levels: list[dict[str, Any]] = []
    for done in range(syncs):
        strategy.trainer.nudge()
        seconds.append(strategy.sync().total_s)
        if done % max(1, syncs // (TENTHS * SAMPLES)) == 0:
            sizes = resident(), cuda_level(strategy.subject.device), on_tmpfs(strategy.folder)
            levels.append({"sync": done, **dict(zip(_SIZES, sizes, strict=True))})
    return tenths(seconds, levels)


def tenths(seconds: Sequence[float], levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ends = [len(seconds) * tenth // TENTHS for tenth in range(TENTHS + 1)]
    return [
        {
            "first": first + 1,
            "last": last,
            "median_s": median(seconds[first:last]),
            **{name: _median([level[name] for level in levels if first <= level["sync"] < last]) for name in _SIZES},
        }
        for first, last in pairwise(ends)
    ]


def _median(values: Sequence[Any]) -> float | None:
    return None if None in values else median(values)


def slopes(tenths: Sequence[EnduranceRow]) -> list[SlopeRow]:
    """A line through each strategy's tenths: one outlier, a busy moment of the machine, moves it little."""
    found = []
    for (strategy, shape, rank), group in groupby(tenths, key=lambda row: (row.strategy, row.shape, row.rank)):
        rows = list(group)
        per_1000: dict[str, Any] = {f"{size}_per_1000": _line(rows, size) for size in _SIZES}
        per_1000["seconds_per_1000"] = _line(rows, "median_s")
        found.append(SlopeRow(strategy=strategy, shape=shape, rank=rank, syncs=rows[-1].last, **per_1000))
    return found


def _line(rows: Sequence[EnduranceRow], name: str) -> float | None:
    values = [getattr(row, name) for row in rows]
    if None in values:
        return None
    return 1000 * linear_regression([(row.first + row.last) / 2 for row in rows], values).slope
