"""Seconds until an earlier version serves and trains again: still loaded, evicted, or merged again."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.gauges import percentile_95
from lora_grpo.bench.plan import Cell, Settings, Subject, beside_native, results
from lora_grpo.bench.schema import RollbackRow
from lora_grpo.scoring import mean_abs_difference

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    how = {"arguments": {"repeat": settings.each_way}, "warm": {"repeat": 1}}
    return [beside_native("rollback", measure, subject, name, **how) for name in settings.others]


def measure(strategy: Strategy, repeat: int) -> dict[str, Any]:
    """Worker: by case, seconds, and how far what is served then is from what the version served when it was new."""
    tokens = strategy.subject.sequences()

    def go_back(between: int) -> tuple[float, float]:
        strategy.trainer.randomise(0.2)
        strategy.sync()
        mark, then = strategy.mark(), strategy.logprobs(tokens)
        for _ in range(between):
            strategy.trainer.randomise(0.2)
            strategy.sync()
        seconds = strategy.rollback(mark).total_s
        return seconds, mean_abs_difference(strategy.logprobs(tokens), then)

    return {case: [go_back(between) for _ in range(repeat)] for case, between in strategy.rollback_cases().items()}


def rows(cell: Mapping[str, Any]) -> list[RollbackRow]:
    """Every case of both strategies; ratios to native's first case."""
    made: list[RollbackRow] = []
    for strategy, found in results(cell).items():
        for case, tries in found.items():
            seconds, errors = zip(*tries, strict=True)
            row = RollbackRow(
                strategy=strategy,
                **cell["labels"],
                case=case,
                median_s=median(seconds),
                p95_s=percentile_95(seconds),
                ratio_to_native=median(seconds) / (made[0].median_s if made else median(seconds)),
                error_nats=max(errors),
            )
            made.append(row)
    return made
