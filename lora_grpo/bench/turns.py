"""Strategies in turn on one device: what each measures on its one engine, and rows of medians that are not paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_grpo.bench.plan import Cell, Subject, results
from lora_grpo.bench.strategies import AGAIN, NATIVE

AT_ONCE = "merge-trl-batched"
BESIDE_NATIVE = ("sync", "decode", "step", "rollback")
"""The tables in which strategies are compared with what native does beside them."""
_ORDER = ("sync", "decode", "rollback", "proof", "fidelity", "drift", "step", "endurance", "truth", "memory")
"""Of what is measured on one engine."""


def one_at_a_time(cells: Sequence[Cell]) -> list[Cell]:
    """The same measurements with one strategy alive at a time, on one engine each, memory last, which lets go of the
    weights; native first, and what others are compared with once more when all are done."""
    made: dict[str, Cell] = {}
    for cell in cells:
        for index, subject in enumerate(cell.subjects):
            alone = _alone(cell, index, subject)
            made.setdefault(alone.key, alone)
    alones = list(made.values())
    main = next((cell.subjects for cell in alones if cell.subjects[0].strategy == NATIVE), None)
    # The merge that is compared most, its weights handed over in one call, on the same engine.
    alones += [
        replace(cell, key=f"{cell.key}/at once", name=AT_ONCE, arguments={**cell.arguments, "at_once": True})
        for cell in alones
        if cell.key.startswith("sync/merge-trl/")
    ]
    alones += [
        replace(cell, key=f"{cell.key}/again", subjects=(cell.subjects[0].with_strategy(AGAIN),))
        for cell in alones
        if cell.subjects == main and cell.table in (*BESIDE_NATIVE, "memory")
    ]
    turns = list(dict.fromkeys(cell.subjects for cell in alones))
    turns.sort(key=lambda subjects: subjects[0].strategy != NATIVE)
    return sorted(alones, key=lambda cell: (turns.index(cell.subjects), _ORDER.index(cell.table)))


def _alone(cell: Cell, index: int, subject: Subject) -> Cell:
    key = f"{cell.table}/{subject.strategy}/r{subject.rank}/{subject.targets}/{subject.graphs}"
    return replace(cell, key=key, subjects=(subject,), order=(0,) * cell.order.count(index), fresh=False)


def compared(cells: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was measured, ready for rows: rounds of one strategy in turn stand behind those of native, or where those
    are missing, of its second turn."""
    for cell in cells.values():
        rounds, kind = cell["rounds"], (cell["table"], cell["labels"])
        if cell["table"] not in BESIDE_NATIVE or len(results(cell)) > 1:
            yield cell
            continue
        alike = [one["rounds"] for one in cells.values() if (one["table"], one["labels"]) == kind]
        of = {found[0]["strategy"]: found for found in alike}
        native = of.get(NATIVE, of.get(AGAIN, rounds))
        yield {**cell, "rounds": rounds if native is rounds else [*native, *rounds], "unpaired": True}
