"""`lora-grpo bench PART`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from lora_grpo.cli.options import integers, print_json, print_table, say, say_error
from lora_grpo.errors import ConfigError

if TYPE_CHECKING:
    from lora_grpo.bench.plan import Settings
    from lora_grpo.bench.runner import Progress
    from lora_grpo.bench.schema import Document

_PARTS = "sync, memory, decode, fidelity, step, rollback, endurance, all, or report."
_SHAPES = "A model of this shape with random weights: tiny, qwen2.5-0.5b, -1.5b, -7b, llama-3.1-8b."


def bench(
    part: Annotated[str, Argument(metavar="PART", help=_PARTS)],
    shape: Annotated[str | None, Option(help=_SHAPES)] = None,
    model: Annotated[str | None, Option(help="A hub name or directory, in place of a shape.")] = None,
    scenario: Annotated[Path | None, Option(help="A TOML file with settings for each part.")] = None,
    ranks: Annotated[str | None, Option(help="LoRA ranks, such as 16,8,64; the first is the main one.")] = None,
    strategies: Annotated[str | None, Option(help="What to compare, such as native,merge-trl.")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda:0.")] = None,
    repeat: Annotated[int | None, Option(min=1, help="How often each strategy is measured.")] = None,
    out: Annotated[Path | None, Option(help="Directory for JSON, report, plots; goes on if cut off.")] = None,
    models: Annotated[Path | None, Option(help="Keep --shape models here; default: not kept.")] = None,
    compare: Annotated[Path | None, Option(help="An older results.json; exit 1 if a ratio moved.")] = None,
    tolerance: Annotated[float, Option(min=0.0, help="How far a ratio may move (--compare).")] = 0.3,
    readme: Annotated[Path | None, Option(help="With report: put the figures into this file.")] = None,
) -> None:
    """Compare loading the adapter alone (native) with merging: speed, memory, rounding errors.

    A description of the machine comes first. Progress goes to stderr; the last line of stdout is the result as JSON.
    Ctrl-C keeps what was measured. With --out, the same command goes on from there.
    `bench report --out DIR` makes plots and report again, from all runs in DIR/bench if there are any.
    """
    if part == "report":
        _report(out, readme)
        return
    options = _options(shape=shape, model=model, ranks=ranks, strategies=strategies, device=device, repeat=repeat)
    from lora_grpo.bench.joining import read_document
    from lora_grpo.bench.plan import plan_parts

    parts = plan_parts(part, scenario, options)
    baseline = None if compare is None else read_document(compare)
    document, interrupted, kept = _run(parts, out, models)
    _show(document, kept)
    if out is not None and kept is None:
        say(f"the finished result in {out} stays until this run is finished too")
    held = baseline is None or _compare(document, baseline, tolerance)
    print_json(document.model_dump(mode="json"))
    if interrupted:
        say("stopped; the same command goes on from here" if out else "stopped; only a run with --out can go on")
        raise typer.Exit(130)
    if document.failures or not held:
        raise typer.Exit(1)


def _run(parts: Mapping[str, Settings], out: Path | None, models: Path | None) -> tuple[Document, bool, Path | None]:
    """What was measured, whether that was interrupted, and where it was written."""
    from lora_grpo.bench.suite import Suite, finished_command

    interrupted = False
    say("looking at this machine")
    try:
        suite = Suite(parts, command=shlex.join(["lora-grpo", *sys.argv[1:]]), out=out, models=models)
    except KeyboardInterrupt:
        say("stopped before anything was measured")
        raise
    if out is not None and finished_command(out):
        say(f"{out} holds this run's finished result: it is measured again, and replaced when that is finished too")
    with closing(suite):
        print_table([{"": name, "value": str(value)} for name, value in suite.card.items()], "lora-grpo bench")
        try:
            with _bar(suite.rounds) as progress:
                suite.run(progress)
        except KeyboardInterrupt:
            interrupted = True
        document = suite.document()
        kept = suite.finish(document)
    return document, interrupted, kept


@contextmanager
def _bar(rounds: int) -> Iterator[Progress]:
    """A bar on a terminal, else a line for each piece of work."""
    if not sys.stderr.isatty():
        yield lambda doing, done: None if done else say(doing)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=rounds)
        yield lambda doing, done: bar.update(task, description=doing, advance=done)


def _show(document: Document, out: Path | None) -> None:
    from lora_grpo.bench.report import findings, write_report
    from lora_grpo.bench.schema import tables

    for title, lines in tables(document):
        print_table(lines, title)
    typer.echo("\n".join(findings(document)))
    if out is not None:
        say(f"report and plots: {write_report(document, out)}")
    for failure in document.failures:
        say_error(failure)


def _compare(document: Document, baseline: Document, tolerance: float) -> bool:
    from lora_grpo.bench.joining import compare

    rows = compare(document, baseline, tolerance)
    print_table(rows, f"against the baseline, tolerance {tolerance:.0%}")
    if not rows:
        say_error("the baseline shares no ratio with this run: same parts, shape and strategies?")
    return bool(rows) and all(row[""] == "" for row in rows)


def _report(out: Path | None, readme: Path | None) -> None:
    from lora_grpo.bench.joining import join, read_document
    from lora_grpo.bench.report import update_readme, write_report

    if out is None:
        raise ConfigError("bench report needs a finished run: give its directory with --out DIR")
    if runs := {path.parent.name: read_document(path) for path in out.glob("bench/*/results.json")}:
        document = join(dict(sorted(runs.items(), key=lambda run: run[1].started_at)))
        (out / "results.json").write_text(document.model_dump_json(indent=1) + "\n")
    document = read_document(out / "results.json")
    typer.echo(str(write_report(document, out)))
    if readme is not None:
        update_readme(document, readme)


def _options(**given: Any) -> dict[str, Any]:
    options = {name: value for name, value in given.items() if value is not None}
    if options.get("shape") and options.get("model"):
        raise typer.BadParameter("give --shape or --model, not both")
    if "strategies" in options:
        options["strategies"] = tuple(options["strategies"].split(","))
    if "ranks" in options:
        first, *others = integers(options.pop("ranks"), "--ranks")
        options |= {"rank": first, "sweep_ranks": tuple(others)}
    return options
