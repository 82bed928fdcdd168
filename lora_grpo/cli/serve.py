"""`lora-grpo serve MODEL` and `store-server RUN`, which run until Ctrl-C, and `lora-grpo bench PART`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from lora_grpo.cli.options import Json, Run, integers, opened, print_json, print_table, say, say_error, tell
from lora_grpo.errors import ConfigError

if TYPE_CHECKING:
    from lora_grpo.bench.plan import Settings
    from lora_grpo.bench.schema import Document
    from lora_grpo.engines.server.launch import Serving


def serve(
    model: Annotated[str, Argument(metavar="MODEL", help="Hub name or directory of the base model.")],
    arguments: Annotated[list[str] | None, Argument(metavar="[-- VLLM_ARGS]...", help="Passed on to vLLM.")] = None,
    replicas: Annotated[int, Option(min=1, help="Number of servers; they share the GPUs.")] = 1,
    host: Annotated[str, Option(help="Address to listen on; if not loopback, set an API key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="The first server's; the next gets port + 1.")] = 8000,
    max_lora_rank: Annotated[int, Option(min=1, help="The adapters' rank.")] = 16,
    max_loras: Annotated[int, Option(min=2, help="Adapter slots: versions in use at the same time.")] = 2,
    max_cpu_loras: Annotated[int | None, Option(min=1, help="Adapters in memory; default: slots + 2.")] = None,
    quantization: Annotated[str | None, Option(help="nf4: quantize the base while loading, for QLoRA.")] = None,
    api_key: Annotated[str | None, Option(envvar="VLLM_API_KEY", help="Safer in the environment.")] = None,
    store_url: Annotated[str | None, Option(help="Pull versions from the store server at this URL.")] = None,
    store_token_file: Annotated[str | None, Option(help="A file with the store server's token.")] = None,
    start_timeout: Annotated[float, Option(min=1, help="Seconds until all must answer, downloads included.")] = 1800.0,
    log_dir: Annotated[Path | None, Option(help="Folder for logs; default: a new temporary one.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the URLs as one line of JSON, when ready.")] = False,
) -> None:
    """Start vLLM servers that `VLLMServerEngine` can load adapters into. They run until Ctrl-C.

    When one server ends, all end; the last lines of its log say why."""
    from lora_grpo.config import check_quantization
    from lora_grpo.engines.server.launch import Servers, Serving

    check_quantization(quantization)
    others: dict[str, Any] = {"api_key": api_key, "store_url": store_url, "store_token_file": store_token_file}
    others |= {"arguments": tuple(arguments or ()), "start_timeout_s": start_timeout}
    serving = Serving(model, replicas, host, port, max_lora_rank, max_loras, max_cpu_loras, **others)
    serving = _of_base(serving, quantization)
    logs = log_dir or Path(tempfile.mkdtemp(prefix="lora-grpo-serve-"))
    logs.mkdir(parents=True, exist_ok=True)
    say(f"starting {replicas} of {model}; logs in {logs}")
    with Servers(serving, logs).running() as servers:
        tell({"urls": servers.urls, "logs": str(logs)}, as_json, "\n".join(servers.urls))
        servers.watch()


def _of_base(serving: Serving, quantization: str | None) -> Serving:
    """With what vLLM is told of the base. What it needs takes long to import: all else was checked before."""
    from lora_grpo.engines.local.targets import serving_arguments

    # What the arguments for vLLM say of the checkpoint, which is read before a server starts.
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--revision")
    known.add_argument("--trust-remote-code", action="store_true")
    told = serving_arguments(serving.model, quantization, **vars(known.parse_known_args(serving.arguments)[0]))
    options = ["--language-model-only"] if "language_model_only" in told else []
    options += ["--quantization", told["quantization"]] if "quantization" in told else []
    return replace(serving, target_modules=tuple(told["lora_target_modules"]), arguments=(*options, *serving.arguments))


def store_server(
    run: Run,
    host: Annotated[str, Option(help="Address to listen on; others can reach any but loopback.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free port.")] = 8731,
    token_file: Annotated[
        Path | None, Option(help="A file with the token; default: LORA_GRPO_STORE_TOKEN_FILE's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a run's versions, read-only, to servers that cannot read the run's disk. It runs until Ctrl-C.

    The run may still train in another process. Every request needs the token. Token and adapters are sent unencrypted:
    in a network that others can read, put a TLS proxy in front."""
    from lora_grpo.remote.client import read_token
    from lora_grpo.remote.server import StoreServer

    token = read_token(token_file)
    with opened(run) as store, StoreServer(store, token, host=host, port=port) as server:
        at = {"url": server.url, "run": server.run, "pid": os.getpid()}
        tell(at, as_json, f"serving {server.run} at {server.url}")
        say(f"replicas need LORA_GRPO_STORE_URL={server.url} and the token; they serve versions as {server.run}@NUMBER")
        server.wait()


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
    `bench report --out DIR` makes plots and report again, from all runs in DIR/bench if there are any."""
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
    from rich.console import Console
    from rich.progress import Progress

    from lora_grpo.bench.suite import Suite, finished_command

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
        bar, interrupted = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()), False
        task = bar.add_task("", total=suite.rounds)

        def progress(doing: str, done: int) -> None:
            bar.update(task, description=doing, advance=done)
            if bar.disable and not done:
                say(doing)

        try:
            with bar:
                suite.run(progress)
        except KeyboardInterrupt:
            interrupted = True
        document = suite.document()
        return document, interrupted, suite.finish(document)


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
