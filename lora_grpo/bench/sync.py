"""Seconds until the engine can sample from the new policy, by phase; bytes moved; times the physical floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_grpo.bench import fidelity, proofs
from lora_grpo.bench.plan import Cell, Subject, beside_native, results
from lora_grpo.bench.schema import SyncRow
from lora_grpo.bench.settings import Settings
from lora_grpo.bench.timing import floor_seconds, percentile_95

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy

WARM = 3
"""Syncs thrown away: caches, allocators and lazily built state of every strategy settle."""


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """Each strategy beside `native` at the first rank, with its truth; what proofs cost besides; the sweeps of ranks
    and targets."""
    planned = [_pair(settings, subject, strategy) for strategy in settings.others]
    if settings.truth:
        # In the same process, while it is alive: what was timed serves what it claims to.
        planned += [fidelity.truth_cell("sync", subject.with_strategy(strategy)) for strategy in settings.strategies]
    if settings.canary_rows:
        planned.append(proofs.cell(settings, subject))
    swept = [strategy for strategy in settings.sweep_strategies if strategy in settings.strategies]
    elsewhere = [replace(subject, rank=rank, targets=targets) for rank, targets in settings.sweep]
    return planned + [_pair(settings, other, strategy) for other in elsewhere for strategy in swept]


def _pair(settings: Settings, subject: Subject, strategy: str) -> Cell:
    labels = {"rank": subject.rank, "targets": subject.targets}
    syncs = {"syncs": -(-settings.repeat // 2)}
    return beside_native("sync", measure, subject, strategy, arguments=syncs, warm={"syncs": WARM}, labels=labels)


def measure(strategy: Strategy, syncs: int, *, at_once: bool = False) -> dict[str, Any]:
    """Worker: syncs, each after a step of the trainer that is not timed; of a merge also with all weights in one
    call."""
    strategy.at_once = at_once
    done = [strategy.renew() for _ in range(syncs)]
    strategy.at_once = False
    return {
        "phases_s": {phase: [synced.seconds[phase] for synced in done] for phase in done[-1].seconds},
        "afterwards_s": [synced.afterwards_s for synced in done],
        "moved_bytes": done[-1].moved_bytes,
        "loader": strategy.loader,
        "load_calls": strategy.load_calls,
    }


def rows(cell: Mapping[str, Any]) -> list[SyncRow]:
    """Both strategies of a pair."""
    rounds = results(cell)
    strategies = list(rounds)
    native_s = median(totals(rounds[strategies[0]]))
    against = ["unpaired"] * len(rounds) if cell.get("unpaired") else reversed(strategies)
    return [
        _row(strategy, rounds[strategy], native_s, cell, other)
        for strategy, other in zip(strategies, against, strict=True)
    ]


def _row(strategy: str, found: list[Any], native_s: float, cell: Mapping[str, Any], against: str) -> SyncRow:
    seconds = totals(found)
    floor_s = floor_seconds(found[-1]["moved_bytes"], cell["bandwidth"])
    return SyncRow(
        strategy=strategy,
        **cell["labels"],
        against=against,
        median_s=median(seconds),
        p95_s=percentile_95(seconds),
        phases_s={phase: median(s for one in found for s in one["phases_s"][phase]) for phase in found[-1]["phases_s"]},
        afterwards_s=median(s for one in found for s in one["afterwards_s"]),
        moved_bytes=max(found[-1]["moved_bytes"].values(), default=0),
        floor_s=floor_s,
        times_floor=median(seconds) / floor_s if floor_s else None,
        ratio_to_native=median(seconds) / native_s,
        syncs=len(seconds),
        loader=found[-1]["loader"],
        load_calls=found[-1]["load_calls"],
    )


def totals(rounds: list[Any]) -> list[float]:
    """Seconds of each sync, all phases."""
    return [sum(one) for result in rounds for one in zip(*result["phases_s"].values(), strict=True)]
