"""A run against a committed one: ratios between strategies, which a faster or slower machine leaves alone."""

from __future__ import annotations

from dataclasses import dataclass

from lora_grpo.bench.schema import Document


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
    """Ratios to native by name; native's own, which are 1, left out."""
    found = {
        f"sync {row.shape} {row.strategy} r{row.rank} {row.targets}": row.ratio_to_native
        for row in document.sync
        if row.strategy != "native"
    }
    found |= {f"proof {row.shape} {row.proof} {row.rows or ''}".rstrip(): row.ratio_to_push for row in document.proof}
    found |= {f"base {row.shape} {row.strategy}": row.copies for row in document.memory if row.copies is not None}
    found |= {
        f"memory {row.shape} {row.strategy}": row.ratio_to_native
        for row in document.memory
        if row.strategy != "native" and row.ratio_to_native is not None
    }
    for row in document.decode:
        if row.strategy != "native":
            found[f"decode {row.shape} {row.strategy} {row.rows}x{row.completion_tokens}"] = (
                row.generate_ratio_to_native
            )
    found |= {
        f"step {row.shape} {row.strategy}": row.ratio_to_native for row in document.step if row.strategy != "native"
    }
    for again in document.rollback:
        if again.strategy != "native":
            found[f"rollback {again.shape} {again.strategy} {again.case}"] = again.ratio_to_native
    return found
