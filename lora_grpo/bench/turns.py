"""Strategies in turn on one device: what each measures on its one engine, and rows of medians that are not paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_grpo.bench.plan import Cell, Subject
from lora_grpo.bench.strategies import NATIVE

AGAIN = f"{NATIVE} again"
AT_ONCE = "merge-trl-batched"
_ORDER = ("sync", "decode", "rollback", "", "truth", "memory")
"""Of what is measured on one engine; the empty name stands for all others."""
_ONCE = ("truth", "proof", "fidelity", "drift", "endurance")
"""What native measures in its first turn alone."""


def one_at_a_time(cells: Sequence[Cell]) -> list[Cell]:
    """The same measurements with one strategy alive at a time, on one engine each, memory last, which lets go of the
    weights; native first, and what others are compared with once more when all are done."""
    made: dict[str, Cell] = {}
    for cell in cells:
        for index, subject in enumerate(cell.subjects):
            alone = _alone(cell, index, subject)
            made.setdefault(alone.key, alone)
    main = next((cell.subjects[0] for cell in made.values() if cell.subjects[0].strategy == NATIVE), None)
    again = [_again(cell) for cell in made.values() if cell.subjects[0] == main and cell.table not in _ONCE]
    merged = [_at_once(cell) for cell in made.values() if cell.table == "sync" and cell.name == "merge-trl"]
    turns = list(dict.fromkeys(cell.subjects[0] for cell in made.values()))
    turns.sort(key=lambda subject: subject.strategy != NATIVE)
    in_order = sorted([*made.values(), *merged], key=lambda cell: (turns.index(cell.subjects[0]), _place(cell)))
    return [*in_order, *sorted(again, key=_place)]


def _alone(cell: Cell, index: int, subject: Subject) -> Cell:
    key = f"{cell.table}/{subject.strategy}/r{subject.rank}/{subject.targets}/{subject.graphs}"
    native = key.replace(f"/{subject.strategy}/", f"/{NATIVE}/", 1)
    return replace(
        cell,
        key=key,
        subjects=(subject,),
        order=(0,) * cell.order.count(index),
        fresh=False,
        in_turn=True,
        name=subject.strategy,
        against=None if subject.strategy == NATIVE else native,
    )


def _again(cell: Cell) -> Cell:
    return replace(cell, key=f"{cell.key}/again", name=AGAIN, turn=1, against=cell.key)


def _at_once(cell: Cell) -> Cell:
    """The merge that is compared most, its weights handed over in one call, on the same engine."""
    return replace(cell, key=f"{cell.key}/at once", name=AT_ONCE, arguments={**cell.arguments, "at_once": True})


def _place(cell: Cell) -> int:
    return _ORDER.index(cell.table if cell.table in _ORDER else "")


def beside_native(cells: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was measured, ready for rows: a strategy's rounds in turn stand behind those of native, or where those are
    missing, of its second turn."""
    for cell in cells.values():
        native = cells.get(str(cell.get("against"))) or cells.get(f"{cell.get('against')}/again")
        if native is None or native is cell or cell["table"] in ("memory", *_ONCE):
            yield cell
        else:
            yield {**cell, "rounds": [*native["rounds"], *cell["rounds"]]}
