"""Rows of a run as one document's tables, the documents of several runs on one machine as one, and a run against an
earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_grpo.bench import endurance
from lora_grpo.bench.breakeven import break_even
from lora_grpo.bench.plan import BESIDE_NATIVE
from lora_grpo.bench.schema import TABLES, Document
from lora_grpo.bench.strategies import NATIVE
from lora_grpo.errors import ConfigError

_OF_A_START = ("load_average_1min", "memory_gib", "commit")
"""What may differ on a card between two starts on one machine."""
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


def finished(found: Mapping[str, list[Any]], device: str) -> dict[str, list[Any]]:
    """Measured tables, native once in each, with the tables that follow from them."""
    tables = {**found, **{table: _native_once(found[table]) for table in BESIDE_NATIVE}}
    peaks = {row.shape: row.peak_bytes for row in tables["memory"] if row.strategy == NATIVE}
    tables["memory"] = [
        row.model_copy(update={"ratio_to_native": row.peak_bytes / peaks[row.shape]}) if row.shape in peaks else row
        for row in tables["memory"]
    ]
    tables["break_even"] = break_even(tables["sync"], tables["decode"], device)
    tables["slopes"] = endurance.slopes(tables["endurance"])
    return tables


def read_document(path: Path) -> Document:
    """What a run has left. Raises `ConfigError` when there is nothing or it is no document."""
    try:
        return Document.model_validate_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"no results at {path}: {error.strerror}") from error
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "all of it"
        raise ConfigError(f"{path} is no result of this suite, or another release's: {where} does not fit") from error


def join(documents: Mapping[str, Document]) -> Document:
    """One document of several by name, so that what one run measured meets what another did.

    Raises `ConfigError` when they are not of one machine with one set of versions. Commits may differ: all are named.
    """
    made = list(documents.values())
    _check_one_machine(documents)
    commits = dict.fromkeys(str(one.card["commit"]) for one in made if "commit" in one.card)
    cards: dict[str, Any] = {}
    for one in reversed(made):
        cards |= one.card
    seconds = [one.seconds for one in made if one.seconds is not None]
    return Document(
        command="; ".join(one.command for one in made),
        started_at=min(one.started_at for one in made),
        seconds=sum(seconds) if len(seconds) == len(made) else None,
        complete=all(one.complete for one in made),
        card=cards | ({"commit": ", ".join(commits)} if commits else {}),
        bandwidth_bytes_per_s={
            channel: max(one.bandwidth_bytes_per_s[channel] for one in made)
            for channel in made[0].bandwidth_bytes_per_s
        },
        settings={f"{name}/{part}": kept for name, one in documents.items() for part, kept in one.settings.items()},
        failures=[failure for one in made for failure in one.failures],
        notes=list(dict.fromkeys(note for one in made for note in one.notes)),
        **finished({table: [row for one in made for row in getattr(one, table)] for table in TABLES}, cards["device"]),
    )


def _check_one_machine(documents: Mapping[str, Document]) -> None:
    (first, mine), *others = ((name, _identity(document)) for name, document in documents.items())
    for name, theirs in others:
        if mine != theirs:
            one, other = (dict(a.items() - b.items()) for a, b in ((mine, theirs), (theirs, mine)))
            raise ConfigError(
                f"{first} and {name} are not from one machine with the same versions: {one} in the first, {other} in "
                "the other; join them separately"
            )


def _identity(document: Document) -> dict[str, Any]:
    labels = {settings.label for settings in document.settings.values()}
    return {name: value for name, value in document.card.items() if name not in {*labels, *_OF_A_START}}


def _native_once(rows: list[Any]) -> list[Any]:
    """Native is measured beside every other strategy: its first row of each kind stands for the others."""
    names = ("strategy", "shape", "engine", "rank", "targets", "rows", "prompt_tokens", "completion_tokens", "case")
    kept: dict[Any, Any] = {}
    for place, row in enumerate(rows):
        kind = tuple(getattr(row, name, None) for name in names)
        kept.setdefault(kind if row.strategy == NATIVE else place, row)
    return list(kept.values())


def compare(now: Document, baseline: Document, tolerance: float) -> list[dict[str, Any]]:
    """Every ratio between strategies that both runs hold, which a faster or slower machine leaves alone; "outside"
    where they are not within the tolerance of each other. One that got better by more is not either: either the
    baseline is out of date, or what native is compared with got slower."""
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
