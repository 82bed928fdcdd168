"""`lora-grpo sweep CONFIG`, `lora-grpo sweep SWEEP --resume`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from typer import Argument, Option

from lora_grpo.cli.options import print_json, say, whole_numbers
from lora_grpo.metrics.quiet import own_stderr
from lora_grpo.metrics.render import table

if TYPE_CHECKING:
    from lora_grpo.trainer.sweeping.plan import SweepPlan

Row = dict[str, Any]
_SWEPT = "grpo.learning_rate=1e-5,3e-5 grpo.seed=0,1; with --sample also log:1e-6..1e-4 or 0.0..0.1"


def sweep(
    config: Annotated[Path, Argument(metavar="CONFIG|SWEEP", help="A TOML file; with --resume a sweep's directory.")],
    settings: Annotated[list[str] | None, Argument(metavar="[KEY=VALUE,VALUE]...", help=_SWEPT)] = None,
    sample: Annotated[int | None, Option(help="Draw this many members at random; no grid.")] = None,
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
    to stdout as JSON. Ctrl-C and SIGTERM stop all members cleanly; --resume goes on.
    """
    from lora_grpo.trainer.sweeping.plan import SweepPlan
    from lora_grpo.trainer.sweeping.sweep import Sweep

    if resume:
        if settings:
            raise typer.BadParameter("--resume goes on with the sweep's own settings; remove the settings given here")
        plan = SweepPlan.read(config)
    else:
        halving = {"rungs": tuple(sorted(whole_numbers(rungs, "--rungs"))), "keep": keep}
        evolving = {"evolve_every": evolve_every, "perturb": tuple(perturb or ())}
        plan = _plan(config, settings or (), sample, at_once=at_once, seed=seed, **halving, **evolving)
    try:
        with _shown() as show:
            summary = Sweep(plan, resume=resume).run(show)
    except KeyboardInterrupt:
        say(f"stopped; go on with: {shlex.join(['lora-grpo', 'sweep', str(plan.directory), '--resume'])}")
        raise
    print_json(summary)


def _plan(config: Path, settings: Sequence[str], sample: int | None, **options: Any) -> SweepPlan:
    from lora_grpo.config_file import load_config
    from lora_grpo.trainer.sweeping.plan import SweepPlan, is_swept, trials_of

    swept = [text for text in settings if is_swept(text)]
    fixed = load_config(config, [text for text in settings if not is_swept(text)])
    return SweepPlan(settings=fixed, trials=trials_of(swept, sample=sample, seed=options["seed"]), **options)


@contextmanager
def _shown() -> Iterator[Callable[[list[Row]], None]]:
    """A live table on a terminal, else a line for each round."""
    with own_stderr() as stream:
        if not stream.isatty():
            yield lambda rows: say(_line(rows))
            return
        with Live(console=Console(file=stream), refresh_per_second=4) as live:
            yield lambda rows: live.update(table(rows, "sweep"))


def _line(rows: Sequence[Row]) -> str:
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    stepped = [row for row in rows if row["reward"] is not None]
    best = max(stepped, key=lambda row: row["reward"], default=None)
    ahead = "" if best is None else f"; best: {best['member']}, step {best['step']}, reward {best['reward']:.3f}"
    return f"{counts}{ahead}"
