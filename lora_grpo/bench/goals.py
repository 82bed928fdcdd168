"""What was set out to be reached, before and after, from the figures of one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_grpo.bench.schema import DecodeRow, Document, MemoryRow, SyncRow
from lora_grpo.bench.strategies import BASE, NATIVE, SHARED, STOCK
from lora_grpo.bench.tables import Line, ms

SYNC_MS, TIMES_MERGE_TRL = 18.0, 80.0
"""Of a push of the 0.5B shape, r=16, on two CPU cores; and how much faster than merging as TRL does."""
CPU_DECODE = {8: 1.3, 64: 1.15}
"""Rows -> native's time a token over the base's."""
CPU_PREFILL, GPU_DECODE, COPIES = 1.15, 1.10, 1.1
FLAT_TIME, FLAT_MEMORY = 0.1, 0.01
"""Shares by which 1,000 syncs may move the time of one, and what is resident or on tmpfs."""
NOT_MEASURED = "not measured"
_SMALL, _LARGE = "qwen2.5-0.5b", "qwen2.5-7b"


@dataclass(frozen=True, slots=True)
class Goal:
    """One line: today's way and ours, of the same run, and whether ours is where it was to be (None: not measured)."""

    what: str
    before: str
    ours: str
    target: str
    met: bool | None

    def line(self) -> Line:
        verdict = {True: "met", False: "NOT met", None: NOT_MEASURED}[self.met]
        return {"what": self.what, "today's way": self.before, "ours": self.ours, "target": self.target, "": verdict}


def goals(document: Document) -> list[Goal]:
    """Every goal that this device is meant for; the others belong to another run."""
    on_cpu = document.card.get("device") == "cpu"
    made = [*_sync(document), *_decode(document)] if on_cpu else []
    return [*made, _base(document), _gpu_decode(document), _endurance(document)]


def _sync(document: Document) -> Iterator[Goal]:
    rows = {
        row.strategy: row
        for row in reversed(document.sync)
        if (row.shape, row.rank, row.targets) == (_SMALL, 16, "all-linear")
    }
    native, by_hand, trl = (rows.get(name) for name in (NATIVE, "by-hand", "merge-trl"))
    what = "publish + load + slot proof, 0.5B, r=16, CPU"
    before = f"by hand {_ms(by_hand)}"
    yield Goal(
        what, before, _ms(native), f"<= {SYNC_MS:.0f} ms", None if native is None else ms(native.median_s) <= SYNC_MS
    )
    merges = [row for name, row in rows.items() if name.startswith("merge")]
    best = min(merges, key=lambda row: row.median_s, default=None)
    ours = f"{trl.ratio_to_native:.1f} times faster" if trl else NOT_MEASURED
    if best:
        ours += f" (than the best, {best.strategy} at {_ms(best)}: {best.ratio_to_native:.1f})"
    reached = None if trl is None else trl.ratio_to_native >= TIMES_MERGE_TRL
    yield Goal("the same against merge-trl", f"merge-trl {_ms(trl)}", ours, f">= {TIMES_MERGE_TRL:.0f} times", reached)


def _ms(row: SyncRow | None) -> str:
    return f"{ms(row.median_s):.1f} ms" if row else NOT_MEASURED


def _decode(document: Document) -> Iterator[Goal]:
    """Native over the base, its own kernels and the stock ones: ratios to the native that ran between them."""
    for count, target in CPU_DECODE.items():
        what = f"CPU decode, native / base, {count} rows"
        yield _over_base(what, _longest(document, count), "tpot_ratio_to_native", target)
    for count in CPU_DECODE:
        what = f"CPU prefill, native / base, {count} rows"
        yield _over_base(what, _longest(document, count), "prefill_ratio_to_native", CPU_PREFILL)


def _over_base(what: str, rows: dict[str, DecodeRow], ratio: str, target: float) -> Goal:
    base, stock = (getattr(rows[name], ratio) if name in rows else None for name in (BASE, STOCK))
    ours = 1 / base if base else None
    before = f"{stock / base:.2f}" if stock and base else NOT_MEASURED
    shown = f"{ours:.2f}" if ours else NOT_MEASURED
    return Goal(what, f"stock kernels {before}", shown, f"<= {target}", None if ours is None else ours <= target)


def _longest(document: Document, count: int, shape: str = _SMALL) -> dict[str, DecodeRow]:
    """By strategy, the row of a shape and batch size with the longest completions, of the first kind of engine."""
    rows = [row for row in document.decode if (row.shape, row.rows) == (shape, count)]
    same = [row for row in rows if row.engine == rows[0].engine]
    return {row.strategy: row for row in sorted(same, key=lambda row: row.completion_tokens)}


def _base(document: Document) -> Goal:
    rows = {(row.strategy, row.shape): row for row in document.memory if row.copies is not None}
    shape = next((shape for name, shape in rows if name == SHARED), "")
    own, shared = rows.get((NATIVE, shape)), rows.get((SHARED, shape))
    reached = None if shared is None or shared.copies is None else shared.copies <= COPIES
    what = "base weights in trainer + engine, copies"
    return Goal(what, f"two copies {_copies(own)}", _copies(shared), f"<= {COPIES}", reached)


def _copies(row: MemoryRow | None) -> str:
    return NOT_MEASURED if row is None or row.copies is None else f"{row.copies:.2f}"


def _gpu_decode(document: Document) -> Goal:
    counts = {row.rows for row in document.decode if row.shape == _LARGE and row.rows >= 64}
    what, target = "GPU decode, native / merged, 7B, at least 64 rows", f"<= {GPU_DECODE:.2f}"
    published = "published 1.33 to 1.39"
    if document.card.get("device") == "cpu" or not counts:
        return Goal(what, published, NOT_MEASURED, target, None)
    found = {
        count: 1 / row.tpot_ratio_to_native
        for count in sorted(counts)
        for name, row in _longest(document, count, _LARGE).items()
        if name.startswith("merge")
    }
    worst = max(found.values(), default=None)
    shown = ", ".join(f"{ratio:.2f} at {count}" for count, ratio in found.items()) or NOT_MEASURED
    return Goal(what, published, shown, target, None if worst is None else worst <= GPU_DECODE)


def _endurance(document: Document) -> Goal:
    what, target = "1,000 syncs: time, PSS and tmpfs per 1,000", "flat: within 10 %, 1 %, 1 %"
    row = next((row for row in document.slopes if row.strategy == NATIVE and row.syncs >= 1000), None)
    if row is None:
        return Goal(what, "-", NOT_MEASURED, target, None)
    shares = (row.time_share, row.memory_share, row.tmpfs_share)
    shown = ", ".join(f"{100 * share:+.2f} %" for share in shares) + f" ({row.shape})"
    limits = (FLAT_TIME, FLAT_MEMORY, FLAT_MEMORY)
    return Goal(what, "-", shown, target, all(share <= limit for share, limit in zip(shares, limits, strict=True)))
