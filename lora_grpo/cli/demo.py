"""`lora-grpo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.output import print_json


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
