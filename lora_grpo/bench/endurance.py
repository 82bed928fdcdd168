"""Many syncs on one engine: whether time, memory and tmpfs stay where they were."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.levels import cuda_level, on_tmpfs, resident
from lora_grpo.bench.plan import Cell, Subject, results_of
from lora_grpo.bench.schema import EnduranceRow, SlopeRow
from lora_grpo.bench.settings import Settings

if TYPE_CHECKING:
    from lora_grpo.bench.prepared import Bench

TENTHS = 10
WARM = 20
"""Syncs thrown away: enough to fill every place that retention then keeps full."""
SAMPLES = 10
"""Looks at the memory in each tenth; each takes as long as a sync."""


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """Each strategy alone: nothing is compared but the first syncs with the last."""
    return [
        Cell(
            f"endurance/{strategy}",
            "endurance",
            "endurance:measure",
            (subject.with_strategy(strategy),),
            {"syncs": settings.endurance_syncs},
            warm={"syncs": WARM},
            labels={"shape": settings.label, "rank": settings.rank},
        )
        for strategy in settings.strategies
    ]


def measure(bench: Bench, syncs: int) -> dict[str, Any]:
    """Worker: seconds of each sync, and by tenth what was resident every so often."""
    seconds: list[float] = []
    levels: list[dict[str, Any]] = []
    every = max(1, syncs // (TENTHS * SAMPLES))
    for done in range(syncs):
        bench.strategy.trainer.nudge()
        seconds.append(bench.strategy.sync().total_s)
        if done % every == 0:
            levels.append({"sync": done, **_levels(bench)})
    return {"seconds": seconds, "levels": levels}


def _levels(bench: Bench) -> dict[str, int | None]:
    return {
        "memory_bytes": resident(),
        "cuda_bytes": cuda_level(bench.subject.device),
        "tmpfs_bytes": on_tmpfs(bench.strategy.files),
    }


def rows(cell: Mapping[str, Any], bandwidth: object) -> list[EnduranceRow]:
    """A row a tenth."""
    strategy = cell["order"][0]
    found = results_of(cell, strategy)[0]
    syncs = len(found["seconds"])
    ends = [syncs * tenth // TENTHS for tenth in range(TENTHS + 1)]
    return [
        EnduranceRow(
            strategy=strategy,
            **cell["labels"],
            first=first + 1,
            last=last,
            median_s=median(found["seconds"][first:last]),
            **_medians([level for level in found["levels"] if first <= level["sync"] < last]),
        )
        for first, last in pairwise(ends)
    ]


def _medians(levels: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    names = ("memory_bytes", "cuda_bytes", "tmpfs_bytes")
    return {name: None if levels[0][name] is None else median([level[name] for level in levels]) for name in names}


def slopes(tenths: Sequence[EnduranceRow]) -> list[SlopeRow]:
    """A line through each strategy's tenths: one outlier, a busy moment of the machine, moves it little."""
    found = []
    for _, group in groupby(tenths, key=lambda row: (row.strategy, row.shape, row.rank)):
        found.append(_slope(list(group)))
    return found


def _slope(rows: Sequence[EnduranceRow]) -> SlopeRow:
    per_1000 = {name: _line(rows, name) for name in ("median_s", "memory_bytes", "cuda_bytes", "tmpfs_bytes")}
    seconds, memory, tmpfs = (per_1000[name] or 0.0 for name in ("median_s", "memory_bytes", "tmpfs_bytes"))
    middle_s = median([row.median_s for row in rows])
    return SlopeRow(
        strategy=rows[0].strategy,
        shape=rows[0].shape,
        rank=rows[0].rank,
        syncs=rows[-1].last,
        median_s=middle_s,
        seconds_per_1000=seconds,
        memory_bytes_per_1000=memory,
        cuda_bytes_per_1000=per_1000["cuda_bytes"],
        tmpfs_bytes_per_1000=tmpfs,
        time_share=seconds / middle_s,
        memory_share=memory / median([row.memory_bytes for row in rows]),
        tmpfs_share=tmpfs / (median([row.tmpfs_bytes for row in rows]) or 1.0),
    )


def _line(rows: Sequence[EnduranceRow], name: str) -> float | None:
    """The slope of a column over sync numbers, per 1,000."""
    values = [getattr(row, name) for row in rows]
    if None in values:
        return None
    return 1000 * statistics.linear_regression([(row.first + row.last) / 2 for row in rows], values).slope
