"""A run against a committed one: ratios between strategies, which a faster or slower machine leaves alone."""

from __future__ import annotations

from typing import Any

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


def compare(now: Document, baseline: Document, tolerance: float) -> list[dict[str, Any]]:
    """Every ratio that both runs hold; "outside" where they are not within the tolerance of each other. One that got
    better by more is not either: either the baseline is out of date, or what native is compared with got slower."""
    old, new = ratios(baseline), ratios(now)
    both = [name for name in new if name in old and old[name] > 0 and new[name] > 0]
    held = {name: 1 / (1 + tolerance) <= new[name] / old[name] <= 1 + tolerance for name in both}
    return [
        {"ratio to native": name, "baseline": old[name], "now": new[name], "": "" if held[name] else "outside"}
        for name in both
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
