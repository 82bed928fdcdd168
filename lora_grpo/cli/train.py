"""`lora-grpo init`, `check`, `train`, `sweep`, `eval` and `demo`: from a model and its data to trained adapters."""

import os
import shlex
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from typer import Argument, Option

from lora_grpo.cli.options import A_VERSION, Json, Overrides, Run, integers, opened, print_json, print_table, say, tell
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import own_stderr
from lora_grpo.metrics.render import table


def init(
    model: Annotated[str, Argument(metavar="MODEL", help="A base model's hub name or directory.")],
    overrides: Overrides = None,
    *,
    data: Annotated[str, Option("--data", "-d", help="Prompts: a .jsonl, .json, .csv or .parquet file or a hub name.")],
    out: Annotated[Path, Option("--out", "-o", help="The file to write; it must not exist yet.")] = Path("run.toml"),
) -> None:
    """Write a config file for a model and a data set, with a reason beside each setting, and check it.

    The exit code is 2 if `lora-grpo check` finds a problem on this machine, such as too little memory."""
    from lora_grpo.trainer.checking import check_run
    from lora_grpo.trainer.proposing import memory_lines, propose

    if out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out, or remove it")
    config, text = propose(model, data, overrides or ())
    findings = list(check_run(config))
    head = [f"# lora-grpo check {out}; lora-grpo train {out}", *memory_lines(findings)]
    with out.open("x", encoding="utf-8") as file:
        file.write("\n".join(head) + "\n\n" + text)
    for finding in findings:
        if not finding.ok:
            say(f"{finding.what}: {finding.found}")
    typer.echo(out)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(2)


def check(
    target: Annotated[str, Argument(metavar="CONFIG|MODEL", help="A TOML file, a run's directory, or a base model.")],
    overrides: Overrides = None,
    engine: Annotated[bool, Option("--engine", help="Start the engine too: compare bases, prove adapters.")] = False,
    rewards: Annotated[bool, Option("--rewards", help="Call each reward function once, on two rows.")] = False,
    random_weights: Annotated[bool, Option("--random-weights", help="Random weights; needs the config alone.")] = False,
    as_json: Json = False,
) -> None:
    """Find what would stop a run, before it trains: settings, data, adapter, memory. Exit code 2 if there is anything.

    For a MODEL, adapter and engine have the default settings. Nothing is written."""
    from lora_grpo.config_file import config_of_model, load_config, names_a_model

    alone = names_a_model(target)
    if random_weights and not alone:
        raise ConfigError(f"--random-weights needs a model's name or directory; {target} holds a run's settings")
    from lora_grpo.trainer.checking import check_run, random_base

    with random_base(target) if random_weights else nullcontext(target) as model:
        config = config_of_model(model, overrides or ()) if alone else load_config(target, overrides or ())
        found = check_run(config, engine=engine, rewards=rewards, alone=alone)
        findings = [{**asdict(finding), "found": finding.found.replace(model, target)} for finding in found]
    tell(findings, as_json, [{**row, "ok": "yes" if row["ok"] else "NO"} for row in findings], f"check of {target}")
    if not all(row["ok"] for row in findings):
        raise typer.Exit(2)


def _help_config(asked: bool) -> None:
    from lora_grpo.config_file import describe_settings

    if asked:
        rows = [setting._asdict() for setting in describe_settings()]
        print_table(rows, "settings of a run; in TOML 'grpo.beta' is 'beta' under [grpo]")
        raise typer.Exit


_SETTINGS = "Explain every setting with its type and default, then exit."


def train(
    config: Annotated[Path, Argument(metavar="CONFIG|RUN", help="A TOML file, or a run's directory to go on with.")],
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="Go on exactly where the run in output_dir stopped.")] = False,
    help_config: Annotated[bool, Option("--help-config", is_eager=True, callback=_help_config, help=_SETTINGS)] = False,
) -> None:
    """Train a LoRA adapter with GRPO.

    Progress goes to stderr; the last line of stdout is the result as JSON.
    Ctrl-C and SIGTERM stop cleanly and leave the last version intact; --resume goes on from there."""
    from lora_grpo.config_file import load_config

    run_config = load_config(config, overrides or ())
    from lora_grpo.trainer import build_trainer
    from lora_grpo.trainer.build import nothing_left

    if resume and (ended := nothing_left(run_config)) is not None:
        if os.environ.get("RANK", "0") == "0":
            say(ended[0])
            print_json(ended[1])
        return
    began = resume
    try:
        with build_trainer(run_config, resume=resume) as trainer:
            began, leads = True, trainer.crew.leads
            if resume and leads and trainer.store.head is None:
                say(f"{trainer.run_dir} holds no run yet, so a new one begins there")
            result = trainer.train()
    except KeyboardInterrupt:
        again = shlex.join(["lora-grpo", "train", str(config), *(overrides or ()), *(["--resume"] if began else [])])
        where = "stopped; go on" if began else "stopped before the training began; start again"
        say(f"{where} with: {again}")
        raise
    if leads:
        print_json(result)


_SWEPT = "grpo.learning_rate=1e-5,3e-5 grpo.seed=0,1; with --sample also log:1e-6..1e-4 or 0.0..0.1"


def sweep(
    config: Annotated[Path, Argument(metavar="CONFIG|SWEEP", help="A TOML file; with --resume a sweep's directory.")],
    settings: Annotated[list[str] | None, Argument(metavar="[KEY=VALUE,VALUE]...", help=_SWEPT)] = None,
    sample: Annotated[int | None, Option(min=1, help="Draw this many members at random; no grid.")] = None,
    at_once: Annotated[int | None, Option(min=1, help="Most members at once; default: all that fit.")] = None,
    rungs: Annotated[str | None, Option(help="Stop the worst at these steps (halving): 5,10,20.")] = None,
    keep: Annotated[float, Option(help="Share of the members that goes on at each rung.")] = 0.5,
    evolve_every: Annotated[int | None, Option(help="Every N steps the worst copy the best (PBT).")] = None,
    perturb: Annotated[list[str] | None, Option(help="A setting to change in each copy; repeatable.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of all random choices of the sweep.")] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on with the sweep in this directory.")] = False,
) -> None:
    """Train one run with many settings at the same time, on one engine and one base model.

    Each combination of settings is a member: a run in a folder of output_dir, which also gets summary.json,
    curves.png and best-adapter/. Settings with one value hold for all members. The table goes to stderr, the summary
    to stdout as JSON. Ctrl-C and SIGTERM stop all members cleanly; --resume goes on."""
    from lora_grpo.config_file import load_config
    from lora_grpo.trainer.sweeping.plan import SweepPlan, is_swept, trials_of
    from lora_grpo.trainer.sweeping.sweep import Sweep

    if resume and settings:
        raise typer.BadParameter("--resume goes on with the sweep's own settings; remove the settings given here")
    if resume:
        plan = SweepPlan.read(config)
    else:
        fixed = load_config(config, [text for text in settings or () if not is_swept(text)])
        trials = trials_of(list(filter(is_swept, settings or ())), sample=sample, seed=seed)
        halving = {"rungs": tuple(sorted(integers(rungs, "--rungs"))), "keep": keep}
        evolving = {"evolve_every": evolve_every, "perturb": tuple(perturb or ())}
        plan = SweepPlan(settings=fixed, trials=trials, at_once=at_once, seed=seed, **halving, **evolving)
    try:
        with own_stderr() as stream:
            live = Live(console=Console(file=stream), refresh_per_second=4) if stream.isatty() else None
            with live or nullcontext():
                summary = Sweep(plan, resume=resume).run(lambda rows: _show(rows, live))
    except KeyboardInterrupt:
        say(f"stopped; go on with: {shlex.join(['lora-grpo', 'sweep', str(plan.directory), '--resume'])}")
        raise
    print_json(summary)


def _show(rows: list[dict[str, Any]], live: Live | None) -> None:
    """The whole table in a terminal, one line elsewhere."""
    if live is not None:
        live.update(table(rows, "sweep"))
        return
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = max((row for row in rows if row["reward"] is not None), key=lambda row: row["reward"], default=None)
    ahead = "" if best is None else f"; best: {best['member']}, step {best['step']}, reward {best['reward']:.3f}"
    say(f"{counts}{ahead}")


_EVALUATED = f"Evaluate this version; repeatable: {A_VERSION} Default: the first and last evaluated."


def evaluate(
    run: Run,
    version: Annotated[list[str] | None, Option("--version", "-v", help=_EVALUATED)] = None,
    as_json: Json = False,
) -> None:
    """Evaluate stored versions on the run's held-out prompts. vLLM makes the completions."""
    from lora_grpo.trainer.replay import evaluate_run

    opened(run).close()
    rows = evaluate_run(run, versions=version or None)
    tell(rows, as_json, rows, f"held-out evaluation of {run}")


def demo(
    output_dir: Annotated[Path, Option("--output-dir", "-o", help="The run directory.")] = Path("runs/demo"),
    steps: Annotated[int | None, Option(min=1, help="GRPO steps; default: the demo's.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of the run.")] = 0,
) -> None:
    """Watch a tiny model learn to add. Its adapter goes to vLLM at every step.

    Progress goes to stderr; the last line of stdout is the result as JSON."""
    from lora_grpo.demo import run_demo

    print_json(run_demo(output_dir=output_dir, steps=steps, seed=seed))
