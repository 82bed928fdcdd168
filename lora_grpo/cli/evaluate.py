"""`lora-grpo eval RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import VERSION_HELP
from lora_grpo.cli.output import print_json, print_table


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/gsm8k.")],
    version: Annotated[
        list[str] | None,
        typer.Option(
            "--version",
            "-v",
            help=f"Evaluate this one; may be given again: {VERSION_HELP} Default: the first and last evaluated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """Evaluate stored versions on the run's held-out prompts, through the engine."""
    from lora_grpo.trainer.replay import evaluate_run

    rows = evaluate_run(run, versions=version or None)
    if as_json:
        print_json(rows)
    else:
        print_table(rows, f"held-out evaluation of {run}")
