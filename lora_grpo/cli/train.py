"""`lora-grpo train CONFIG`, `lora-grpo train RUN --resume`, `lora-grpo eval RUN` and `lora-grpo demo`."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import VERSION_HELP, Json, Overrides, Run
from lora_grpo.cli.output import print_json, print_table, say, tell_rows


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG|RUN", help="A TOML file, or a run's directory to go on with.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in output_dir stopped, exactly.")
    ] = False,
    help_config: Annotated[
        bool,
        typer.Option(
            "--help-config",
            is_eager=True,
            callback=lambda asked: _help_config() if asked else None,
            help="Explain every setting, with its type and default, and exit.",
        ),
    ] = False,
) -> None:
    """Train a LoRA adapter with GRPO.

    The view goes to stderr; the last line of stdout is the result as JSON.
    Ctrl-C and SIGTERM stop cleanly, the last version intact; --resume goes on from there.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from lora_grpo.config_file import load_config

    run_config = load_config(config, overrides or ())
    from lora_grpo.trainer import build_trainer

    began = resume
    try:
        with build_trainer(run_config, resume=resume) as trainer:
            began = True
            result = trainer.train()
            leads = trainer.crew.leads
    except KeyboardInterrupt:
        again = shlex.join(["lora-grpo", "train", str(config), *(overrides or ()), *(["--resume"] if began else [])])
        say(
            f"stopped; go on with: {again}"
            if began
            else f"stopped before the training began; start again with: {again}"
        )
        raise
    if leads:
        print_json(result)


def _help_config() -> None:
    from lora_grpo.config_file import describe_settings

    rows = [setting._asdict() for setting in describe_settings()]
    print_table(rows, "settings of a run; in TOML 'grpo.beta' is 'beta' under [grpo]")
    raise typer.Exit


def evaluate(
    run: Run,
    version: Annotated[
        list[str] | None,
        typer.Option(
            "--version",
            "-v",
            help=f"Evaluate this one; may be given again: {VERSION_HELP} Default: the first and last evaluated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate stored versions on the run's held-out prompts, through the engine."""
    from lora_grpo.trainer.replay import evaluate_run

    rows = evaluate_run(run, versions=version or None)
    tell_rows(rows, as_json, rows, f"held-out evaluation of {run}")


def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The run directory.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="GRPO steps; default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
) -> None:
    """Watch a tiny model get better at adding, its adapter travelling to vLLM at every step.

    The view goes to stderr; the last line of stdout is the result as JSON.
    """
    from lora_grpo.demo.run import run_demo

    print_json(run_demo(output_dir=output_dir, steps=steps, seed=seed))
