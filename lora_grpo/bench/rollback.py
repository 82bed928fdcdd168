"""Seconds until an earlier version serves and trains again: still loaded, evicted, or merged again."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.plan import Cell, Subject, beside_native, results
from lora_grpo.bench.schema import RollbackRow
from lora_grpo.bench.settings import Settings
from lora_grpo.bench.timing import percentile_95
from lora_grpo.scoring import mean_abs_difference

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """`native` beside each other strategy."""
    how = {"arguments": {"repeat": -(-settings.repeat // 2)}, "warm": {"repeat": 1}}
    return [beside_native("rollback", measure, subject, name, **how) for name in settings.others]


def measure(strategy: Strategy, repeat: int) -> dict[str, Any]:
    """Worker: by case, seconds, and how far what is served then is from what the version served when it was new."""
    cases = strategy.rollback_cases()
    return {case: [_go_back(strategy, between) for _ in range(repeat)] for case, between in cases.items()}


def _go_back(strategy: Strategy, between: int) -> dict[str, float]:
    tokens = strategy.subject.sequences()
    strategy.trainer.randomise(0.2)
    strategy.sync()
    mark, then = strategy.mark(), strategy.logprobs(tokens)
    for _ in range(between):
        strategy.trainer.randomise(0.2)
        strategy.sync()
    seconds = strategy.rollback(mark).total_s
    return {"seconds": seconds, "error_nats": mean_abs_difference(strategy.logprobs(tokens), then)}


def rows(cell: Mapping[str, Any]) -> list[RollbackRow]:
    """Every case of both strategies; ratios to native's first case."""
    rounds = results(cell)
    native = next(iter(rounds.values()))
    native_s = median(_values(native, next(iter(native[0])), "seconds"))
    return [
        RollbackRow(
            strategy=strategy,
            **cell["labels"],
            case=case,
            median_s=(middle := median(_values(found, case, "seconds"))),
            p95_s=percentile_95(_values(found, case, "seconds")),
            ratio_to_native=middle / native_s,
            error_nats=max(_values(found, case, "error_nats")),
        )
        for strategy, found in rounds.items()
        for case in found[0]
    ]


def _values(found: list[Any], case: str, name: str) -> list[float]:
    return [one[name] for result in found for one in result[case]]
