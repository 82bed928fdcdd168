"""A run as Markdown: the card, what the figures say in words, the plots, the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_grpo.bench import breakeven
from lora_grpo.bench.plots import draw
from lora_grpo.bench.schema import Document, SyncRow, ms, tables
from lora_grpo.bench.strategies import NATIVE, SHARED
from lora_grpo.errors import ConfigError

REPORT, TRIED, SUMMARY = "report.md", "tried.md", "summary.json"
UNPAIRED = "unpaired"
_BLOCK = r"(<!-- {0}:begin -->\n).*?(<!-- {0}:end -->)"


def write_report(document: Document, directory: Path) -> Path:
    """Draw the plots and write `report.md` beside them; returns its path."""
    plots, path = [plot.name for plot in draw(document, directory)], directory / REPORT
    path.write_text("\n".join(_lines(document, plots, _summary(directory), _tried(directory))) + "\n")
    return path


def _summary(directory: Path) -> dict[str, Any]:
    """What `benchmarks/gpu/run.py` left beside the results: its steps, and where models were."""
    path = directory / SUMMARY
    return json.loads(path.read_text()) if path.exists() else {"steps": [], "notes": []}


def _tried(directory: Path) -> str:
    """What is written in `tried.md` beside the results or above them, where a repository keeps it."""
    found = (folder / TRIED for folder in [directory, *directory.resolve().parents[:2]])
    return next((path.read_text().strip() for path in found if path.exists()), "")


def update_readme(document: Document, readme: Path) -> None:
    """Put the figures between `<!-- bench:begin -->` and `<!-- bench:end -->`, those of a GPU between `gpu:begin` and
    `gpu:end`. Raises `ConfigError` without those."""
    name = "bench" if document.card.get("device") == "cpu" else "gpu"
    text = readme.read_text()
    short = document.model_copy(update={"break_even": breakeven.earliest(document.break_even)})
    block = "\n".join([*findings(short), "", *_provenance(document)])
    pattern = re.compile(_BLOCK.format(name), re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{block}\n{found[2]}", text)
    if count != 1:
        raise ConfigError(f"{readme} needs one <!-- {name}:begin --> ... <!-- {name}:end --> for the figures to go in")
    readme.write_text(changed)


def _lines(document: Document, plots: Sequence[str], run: Mapping[str, Any], tried: str) -> Iterator[str]:
    yield "# Benchmark: native hot-swap against merging"
    yield ""
    yield from _provenance(document)
    yield ""
    if not document.complete:
        yield "**Not complete**: the run was cut off, or a part failed."
    yield from (f"**Failed**: {failure}" for failure in document.failures)
    yield "## What it says"
    yield ""
    yield from findings(document)
    yield from (f"- {note}" for note in (*run["notes"], *document.notes))
    if run["steps"]:
        yield "\n## Steps of the run\n"
        yield from markdown_table(run["steps"])
    yield from _profile(document)
    for plot in plots:
        yield f"\n![{Path(plot).stem.replace('-', ' ')}]({plot})"
    for title, lines in tables(document):
        yield f"\n## {title}\n"
        yield from markdown_table(lines)
    if tried:
        yield f"\n## Tried, and it did not help\n\n{tried}"
    yield "\n## How it was measured\n"
    yield Path(__file__).with_name("method.md").read_text().rstrip()


def _profile(document: Document) -> Iterator[str]:
    """Where the time of native's first sync row of each shape goes."""
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
    """The main figures as sentences, those where merging wins included."""
    first = [*_sync_findings(document), *_decode_findings(document), *map(breakeven.sentence, document.break_even)]
    of_weights = (*_fidelity_findings(document), *_drift_findings(document))
    more = (*_step_findings(document), *_base_findings(document))
    return [f"- {sentence}" for sentence in (*first, *of_weights, *more)]


def _sync_findings(document: Document) -> Iterator[str]:
    for shape in dict.fromkeys(row.shape for row in document.sync):
        rows = [row for row in document.sync if row.shape == shape]
        main = [row for row in rows if (row.rank, row.targets) == (rows[0].rank, rows[0].targets)]
        native = next((row for row in main if row.strategy == NATIVE), None)
        if native is None:
            continue
        through = f" through {LOADERS[native.loader]}" if native.loader else ""
        yield (
            f"Sync, {native.shape}, r={native.rank} {native.targets}: native takes {ms(native.median_s):.1f} ms (p95 "
            f"{ms(native.p95_s):.1f}) for {native.moved_bytes / 1e6:.1f} MB{through}, proof included."
        )
        yield from (_against_native(row) for row in main if row.strategy != NATIVE)


def _against_native(row: SyncRow) -> str:
    if row.strategy == f"{NATIVE} again":
        return (
            f"native once more, after all others: {ms(row.median_s):.1f} ms, {row.ratio_to_native:.3g} times its first."
        )
    faster = row.ratio_to_native >= 1
    factor = row.ratio_to_native if faster else 1 / row.ratio_to_native
    # As TRL makes them: a tensor each.
    calls = f" ({row.load_calls:,} single-tensor load_weights calls)" if (row.load_calls or 0) > 1 else ""
    medians = ", by unpaired medians" if row.against == UNPAIRED else ""
    return (
        f"{row.strategy} takes {ms(row.median_s):.1f} ms{calls}: native is {factor:.3g} times "
        f"{'faster' if faster else 'slower'}{medians}."
    )


def _decode_findings(document: Document) -> Iterator[str]:
    for row in document.decode:
        longest = max(one.completion_tokens for one in document.decode)
        other = {"base": "the base's", "merge-trl": "merged weights'"}.get(row.strategy)
        if other and row.completion_tokens == longest and (row.strategy == "base" or row.engine == "graphs alone"):
            yield (
                f"Decode, {row.shape}, {row.rows} rows: native LoRA takes {1 / row.tpot_ratio_to_native:.2f} times "
                f"{other} time a token and {1 / row.prefill_ratio_to_native:.2f} times its prefill."
            )


def _fidelity_findings(document: Document) -> Iterator[str]:
    for rate in sorted({row.learning_rate for row in document.fidelity}):
        rows = {row.strategy: row for row in reversed(document.fidelity) if row.learning_rate == rate}
        merges = {name: row for name, row in rows.items() if name.startswith("merge")}
        if NATIVE in rows and merges:
            best = min(merges.values(), key=lambda row: row.lost_share)
            yield (
                f"Fidelity, {best.shape}, {best.updates} update at a learning rate of {rate:g}: on the bf16 grid the "
                f"best merge ({best.strategy}) loses {100 * best.lost_share:.1f} % of the update, native "
                f"{100 * rows[NATIVE].lost_share:.2f} %."
            )


def _drift_findings(document: Document) -> Iterator[str]:
    most = max((row.cycles for row in document.drift), default=0)
    for row in document.drift:
        if row.cycles == most:
            yield (
                f"Drift, {row.shape}: after {row.cycles} syncs by {row.strategy} the trainer's base is off by "
                f"{100 * row.mean_relative:.3g} % of its mean weight, its log-probs by {row.logprob_shift_nats:.3g} "
                "nats."
            )


def _step_findings(document: Document) -> Iterator[str]:
    merges = [row for row in document.step if row.strategy != NATIVE]
    if merges:
        best = min(merges, key=lambda row: row.ratio_to_native)
        ratio = best.serving_ratio_to_native
        alone = "times for generate and sync alone (training is the same work on both)"
        yield (
            f"Step, {best.shape}, {best.rows} rows of {best.completion_tokens} tokens: the best merge ({best.strategy})"
            f" takes {best.ratio_to_native:.2f} times native's time{f', {ratio:.2f} {alone}' if ratio else ''}."
        )


def _base_findings(document: Document) -> Iterator[str]:
    for row in document.memory:
        if row.strategy in (NATIVE, SHARED) and row.copies is not None:
            yield f"Base weights, {row.shape}: trainer and engine of {row.strategy} hold {row.copies:.2f} copies."


def markdown_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines as a Markdown table; columns that are empty throughout are left out."""
    names = [name for name in lines[0] if any(line[name] is not None for line in lines)]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for line in lines:
        yield "| " + " | ".join(_cell(line[name]) for name in names) + " |"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"
    return "-" if value is None else str(value)


def _provenance(document: Document) -> Iterator[str]:
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in document.card.items())
    took = f" in {document.seconds / 60:.1f} minutes" if document.seconds is not None else ""
    yield f"Measured {document.started_at}{took} with `{document.command}` on: {shown}."


LOADERS = {"direct": "the direct loader", "stock": "vLLM's own loader"}
"""`LoadReceipt.loader` in words."""
PHASES = {
    "gather": "parameters to one buffer of the serving dtype, scaling folded into B",
    "write": "files onto fresh tmpfs pages, digest, rename",
    "check": "file mapped, tensors bound to modules; its digest too, where a load reads it back",
    "load": "registered in vLLM, copied into a slot",
    "prove": "the slot's bytes hashed against the published digest",
    "promote": "HEAD moved",
    "device": "what the device still had queued",
}
