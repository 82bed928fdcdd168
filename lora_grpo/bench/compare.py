"""A run against a committed one: ratios between strategies, which a faster or slower machine leaves alone."""

from __future__ import annotations

from dataclasses import dataclass

from lora_grpo.bench.schema import Document
from lora_grpo.bench.strategies import NATIVE

RATIOS = (
    ("sync", "ratio_to_native", "{row.strategy} r{row.rank} {row.targets}"),
    ("proof", "ratio_to_push", "{row.proof}, {row.rows} rows"),
    ("memory", "copies", "{row.strategy}, copies of the base"),
    ("memory", "ratio_to_native", "{row.strategy}"),
    ("decode", "generate_ratio_to_native", "{row.strategy} {row.rows}x{row.completion_tokens}"),
    ("step", "ratio_to_native", "{row.strategy}"),
    ("rollback", "ratio_to_native", "{row.strategy} {row.case}"),
)
"""Table, column, and what a ratio is called there."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One ratio now and then; `held` when they are within the tolerance of each other."""

    name: str
    baseline: float
    now: float
    held: bool


def compare(now: Document, baseline: Document, tolerance: float) -> list[Difference]:
    """Every ratio that both runs hold. One that got better by more than the tolerance is not held either: either the
    baseline is out of date, or what native is compared with got slower."""
    old, new = ratios(baseline), ratios(now)
    return [
        Difference(name, old[name], new[name], 1 / (1 + tolerance) <= new[name] / old[name] <= 1 + tolerance)
        for name in new
        if name in old and old[name] > 0 and new[name] > 0
    ]


def ratios(document: Document) -> dict[str, float]:
    """Ratios by name; those to native without native's own, which are 1."""
    found = {}
    for table, column, name in RATIOS:
        for row in getattr(document, table):
            ratio = getattr(row, column)
            if ratio is not None and (row.strategy != NATIVE or not column.endswith("to_native")):
                found[f"{table} {row.shape} {name.format(row=row)}"] = ratio
    return found
