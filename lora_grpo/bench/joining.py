"""What follows from measured rows: where a merge breaks even, several runs as one, a run against an earlier one."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import linear_regression
from typing import Any

from pydantic import ValidationError

from lora_grpo.bench.plan import BESIDE_NATIVE, NATIVE, TABLES
from lora_grpo.bench.schema import BreakEvenRow, DecodeRow, Document, EnduranceRow, SlopeRow, SyncRow, Winner
from lora_grpo.errors import ConfigError

_OF_A_START = ("load_average_1min", "memory_gib", "commit")  # may differ on a card between two starts on one machine
RATIOS = (  # table, column, and what a ratio is called there
    ("sync", "ratio_to_native", "{row.strategy} r{row.rank} {row.targets}"),
    ("proof", "ratio_to_push", "{row.proof}, {row.rows} rows"),
    ("memory", "copies", "{row.strategy}, copies of the base"),
    ("memory", "ratio_to_native", "{row.strategy}"),
    ("decode", "generate_ratio_to_native", "{row.strategy} {row.rows}x{row.completion_tokens}"),
    ("step", "ratio_to_native", "{row.strategy}"),
    ("rollback", "ratio_to_native", "{row.strategy} {row.case}"),
)


def finished(found: Mapping[str, list[Any]], device: str) -> dict[str, list[Any]]:
    """Measured tables, native once in each, with the tables that follow from them."""
    tables = {**found, **{table: _native_once(found[table]) for table in BESIDE_NATIVE}}
    peaks = {row.shape: row.peak_bytes for row in tables["memory"] if row.strategy == NATIVE}
    tables["memory"] = [
        row.model_copy(update={"ratio_to_native": row.peak_bytes / peaks[row.shape]}) if row.shape in peaks else row
        for row in tables["memory"]
    ]
    tables["break_even"] = break_even(tables["sync"], tables["decode"], device)
    tables["slopes"] = slopes(tables["endurance"])
    return tables


def slopes(tenths: Sequence[EnduranceRow]) -> list[SlopeRow]:
    """A line through each strategy's tenths: one outlier, a busy moment of the machine, moves it little."""
    found = []
    for (strategy, shape, rank), group in groupby(tenths, key=lambda row: (row.strategy, row.shape, row.rank)):
        rows = list(group)
        middles = [(row.first + row.last) / 2 for row in rows]
        per_1000: dict[str, Any] = {}
        for column in ("median_s", "memory_bytes", "cuda_bytes", "tmpfs_bytes"):
            values = [getattr(row, column) for row in rows]
            slope = None if None in values else 1000 * linear_regression(middles, values).slope
            per_1000[f"{column.replace('median_s', 'seconds')}_per_1000"] = slope
        found.append(SlopeRow(strategy=strategy, shape=shape, rank=rank, syncs=rows[-1].last, **per_1000))
    return found


def break_even(sync: Sequence[SyncRow], decode: Sequence[DecodeRow], device: str) -> list[BreakEvenRow]:
    """A row for each merge of the sync table (sweeps left out) and each batch size that its engine was decoded with."""
    rows: list[BreakEvenRow] = []
    first = {(row.strategy, row.shape): row for row in reversed(sync) if not row.strategy.startswith(NATIVE)}
    for pair in reversed(first.values()):
        curves = sorted(_curves(pair, decode, device), key=lambda row: row.completion_tokens, reverse=True)
        longest = {row.rows: row for row in reversed(curves)}
        rows += [_row(pair, longest[count]) for count in sorted(longest)]
    return rows


def _curves(pair: SyncRow, decode: Sequence[DecodeRow], device: str) -> list[DecodeRow]:
    """The merge's own decode figures, or merge-trl's: merged weights are merged weights, but for those of merge-fold on
    a CPU, which are not prepacked."""
    of_shape = [row for row in decode if row.shape == pair.shape]
    found = [row for row in of_shape if row.strategy == pair.strategy]
    if not found and pair.strategy.startswith("merge") and (device != "cpu" or pair.strategy != "merge-fold"):
        found = [row for row in of_shape if row.strategy == "merge-trl"]
    # Of engines that run otherwise, the first ones measured.
    return [row for row in found if row.engine == found[0].engine]


def _row(pair: SyncRow, decoded: DecodeRow) -> BreakEvenRow:
    gain_s = pair.median_s - pair.median_s / pair.ratio_to_native
    loss_s = decoded.tpot_s / decoded.tpot_ratio_to_native - decoded.tpot_s
    prefill_s = decoded.prefill_s / decoded.prefill_ratio_to_native - decoded.prefill_s
    tokens, beyond = crossing(gain_s - prefill_s, loss_s)
    return BreakEvenRow(
        strategy=pair.strategy,
        shape=pair.shape,
        rows=decoded.rows,
        sync_gain_s=gain_s,
        decode_loss_s_per_token=loss_s,
        prefill_loss_s=prefill_s,
        completion_tokens=tokens,
        beyond=beyond,
        measured_up_to_tokens=decoded.completion_tokens,
    )


def crossing(gain_s: float, loss_s_per_token: float) -> tuple[float | None, Winner]:
    """The completion length at which native's constant gain meets its loss at each token after the first (None: they
    never meet), and who is faster on longer ones."""
    if gain_s >= 0 and loss_s_per_token <= 0:
        return None, "native"
    if gain_s <= 0 and loss_s_per_token >= 0:
        return None, "merge"
    return 1.0 + gain_s / loss_s_per_token, "merge" if loss_s_per_token > 0 else "native"


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
    """One document of several by name, so that what one run measured meets what another did: all their commits are
    named. Raises `ConfigError` when they are not of one machine with one set of versions."""
    made = list(documents.values())
    _check_one_machine(documents)
    commits = dict.fromkeys(str(one.card["commit"]) for one in made if "commit" in one.card)
    cards = {name: value for one in reversed(made) for name, value in one.card.items()}
    seconds = [one.seconds for one in made if one.seconds is not None]
    bandwidths = [one.bandwidth_bytes_per_s for one in made]
    return Document(
        command="; ".join(one.command for one in made),
        started_at=min(one.started_at for one in made),
        seconds=sum(seconds) if len(seconds) == len(made) else None,
        complete=all(one.complete for one in made),
        card=cards | ({"commit": ", ".join(commits)} if commits else {}),
        bandwidth_bytes_per_s={channel: max(one[channel] for one in bandwidths) for channel in bandwidths[0]},
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
            differ = f"{one} in the first, {other} in the other"
            raise ConfigError(f"{first} and {name} are not of one machine and versions: {differ}; join them separately")


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
    """Every ratio that both runs hold, which a faster or slower machine leaves alone; "outside" beyond the tolerance.
    So is one that got better: the baseline is out of date, or what native is compared with got slower."""
    earlier, rows = ratios(baseline), []
    for name, new in ratios(now).items():
        if (old := earlier.get(name, 0.0)) > 0 and new > 0:
            held = 1 / (1 + tolerance) <= new / old <= 1 + tolerance
            rows.append({"ratio to native": name, "baseline": old, "now": new, "": "" if held else "outside"})
    return rows


def ratios(document: Document) -> dict[str, float]:
    """Ratios by name; those to native without native's own, which are 1."""
    return {
        f"{table} {row.shape} {name.format(row=row)}": ratio
        for table, column, name in RATIOS
        for row in getattr(document, table)
        if (ratio := getattr(row, column)) is not None
        if row.strategy != NATIVE or not column.endswith("to_native")
    }
