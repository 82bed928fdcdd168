"""A run as Markdown: the card, what the figures say in words, the plots, the tables."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_grpo.bench.plan import NATIVE
from lora_grpo.bench.plots import draw
from lora_grpo.bench.schema import BreakEvenRow, Document, figure, ms, percent, tables
from lora_grpo.errors import ConfigError, counted

REPORT, SUMMARY = "report.md", "summary.json"  # benchmarks/gpu/run.py leaves the latter: its steps, where models were


def write_report(document: Document, directory: Path) -> Path:
    path, left = directory / REPORT, directory / SUMMARY
    run = json.loads(left.read_text()) if left.exists() else {"steps": [], "notes": []}
    path.write_text("\n".join(_lines(document, draw(document, directory), run)) + "\n")
    return path


def update_readme(document: Document, readme: Path) -> None:
    """Put the figures between the marks for them. Raises `ConfigError` without those."""
    name = "bench" if document.card.get("device") == "cpu" else "gpu"
    short = document.model_copy(update={"break_even": earliest(document.break_even)})
    block = "\n".join([*findings(short), "", *_provenance(document)])
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{block}\n{found[2]}", readme.read_text())
    if count != 1:
        raise ConfigError(f"{readme} needs one <!-- {name}:begin --> ... <!-- {name}:end --> for the figures to go in")
    readme.write_text(changed)


def _lines(document: Document, plots: Sequence[Path], run: Mapping[str, Any]) -> Iterator[str]:
    yield "# Benchmark: native hot-swap against merging\n"
    yield from _provenance(document)
    yield ""
    if not document.complete:
        yield "**Not complete**: the run was cut off, or a part failed."
    yield from (f"**Failed**: {failure}" for failure in document.failures)
    yield "## What it says\n"
    yield "A figure in brackets says how many times native's it is.\n"
    yield from findings(document)
    yield from (f"- {note}" for note in (*run["notes"], *document.notes))
    if run["steps"]:
        yield "\n## Steps of the run\n"
        yield from markdown_table(run["steps"])
    yield from _profile(document)
    for plot in plots:
        yield f"\n![{plot.stem.replace('-', ' ')}]({plot.name})"
    for title, lines in tables(document):
        yield f"\n## {title}\n"
        yield from markdown_table(lines)
    yield "\n## How it was measured\n"
    yield Path(__file__).with_name("method.md").read_text().rstrip()


def _profile(document: Document) -> Iterator[str]:
    first = {row.shape: row for row in reversed(document.sync) if row.strategy == NATIVE}
    for row in reversed(first.values()):
        yield f"\n## Where the milliseconds of a sync go: native, {row.shape}, r={row.rank} {row.targets}\n"
        total_s = sum(row.phases_s.values())
        names = ("phase", "ms", "% of the sync", "what it is")
        phases = ((name, ms(value), 100 * value / total_s, PHASES.get(name)) for name, value in row.phases_s.items())
        yield from markdown_table([dict(zip(names, phase, strict=True)) for phase in phases])
        floor = f", {row.times_floor:.0f} times the floor of {ms(row.floor_s):.2f} ms" if row.times_floor else ""
        after = f"{ms(row.afterwards_s):.1f} ms of pruning and leases come after."
        yield f"\nIn all {ms(row.median_s):.1f} ms{floor}; {after}"


def findings(document: Document) -> list[str]:
    """The main figures as sentences, those where merging wins included; in brackets stand times native's."""
    fewest = min((row.updates for row in document.fidelity), default=0)
    most = max((row.cycles for row in document.drift), default=0)
    once = [row for row in document.fidelity if row.updates == fewest]
    last = [row for row in document.drift if row.cycles == most]
    held = [row for row in document.memory if row.copies]
    sizes = "{0.shape}, {rows} of {0.completion_tokens} tokens"
    sentences = (
        *_listed(document.sync, "Sync, {0.shape}, r={0.rank} {0.targets}", _times("median_s", "ratio_to_native")),
        *_listed(document.decode, f"A token, {sizes}", _times("tpot_s", "tpot_ratio_to_native")),
        *map(sentence, document.break_even),
        *_listed(once, "Lost of an update, {0.shape}, learning rate {0.learning_rate:g}", _share("lost_share")),
        *_listed(last, "Drift of the trainer's base, {0.shape}, {0.cycles:,} syncs", _share("mean_relative")),
        *_listed(document.step, f"Step, {sizes}", _times("step_s", "ratio_to_native")),
        *_listed(held, "Copies of the base, {0.shape}", lambda row: f"{row.copies:.2f}"),
    )
    return [f"- {said}" for said in sentences]


def earliest(rows: Sequence[BreakEvenRow]) -> list[BreakEvenRow]:
    """Of each shape and batch size, the merge that wins from the shortest completions on; the first where none does."""
    kinds = dict.fromkeys((row.shape, row.rows) for row in rows)
    return [min((row for row in rows if (row.shape, row.rows) == kind), key=_wins_from) for kind in kinds]


def _wins_from(row: BreakEvenRow) -> float:
    if row.beyond == "merge":
        return row.completion_tokens or 0.0
    return math.inf if row.completion_tokens is None else 0.0


def sentence(row: BreakEvenRow) -> str:
    beyond = row.completion_tokens is not None and row.completion_tokens > row.measured_up_to_tokens
    where = f"{row.merging_wins}{' (extrapolated)' if beyond else ''}"
    return (
        f"{row.shape}, {counted(row.rows, 'row')}: {row.strategy} wins {where}: its sync is "
        f"{_than_native(row.sync_gain_s)}, its prefill {_than_native(-row.prefill_loss_s)}, each token "
        f"{_than_native(-row.decode_loss_s_per_token)} than native's."
    )


def _than_native(seconds: float) -> str:
    return f"{1e3 * abs(seconds):,.2f} ms {'slower' if seconds >= 0 else 'faster'}"


def _listed(rows: Sequence[Any], about: str, told: Callable[[Any], str]) -> Iterator[str]:
    """Each strategy's figure, in a sentence for all rows that are about the same."""
    figures: dict[str, list[str]] = {}
    for row in rows:
        what = about.format(row, rows=counted(getattr(row, "rows", 0), "row"))
        figures.setdefault(what, []).append(f"{row.strategy} {told(row)}")
    return (f"{what}: {', '.join(said)}." for what, said in figures.items())


def _times(seconds: str, ratio: str) -> Callable[[Any], str]:
    def said(row: Any) -> str:
        beside = "" if row.strategy == NATIVE else f" ({getattr(row, ratio):.3g})"
        return f"{figure(ms(getattr(row, seconds)))} ms{beside}"

    return said


def _share(name: str) -> Callable[[Any], str]:
    return lambda row: f"{figure(percent(getattr(row, name)))} %"


def markdown_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines as a Markdown table; columns that are empty throughout are left out."""
    names = [name for name in lines[0] if any(line[name] is not None for line in lines)]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for line in lines:
        yield "| " + " | ".join(_cell(line[name]) for name in names) + " |"


def _cell(value: object) -> str:
    return figure(value) if isinstance(value, float) else "-" if value is None else str(value)


def _provenance(document: Document) -> Iterator[str]:
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in document.card.items())
    took = f" in {document.seconds / 60:.1f} minutes" if document.seconds is not None else ""
    yield f"Measured {document.started_at}{took} with `{document.command}` on: {shown}."


PHASES = {
    "gather": "parameters to one buffer of the serving dtype, scaling folded into B",
    "write": "files onto fresh tmpfs pages, digest, rename",
    "check": "file mapped, tensors bound to modules; its digest too, where a load reads it back",
    "load": "registered in vLLM, copied into a slot",
    "prove": "the slot's bytes hashed against the published digest",
    "promote": "HEAD moved",
    "device": "what the device still had queued",
}
