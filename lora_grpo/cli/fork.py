"""`lora-grpo fork RUN VERSION NEW`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import Json, Run, Version
from lora_grpo.cli.output import print_json, say


def fork(
    run: Run,
    version: Version,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new run's directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the run's: grpo.learning_rate=3e-5"),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Begin at step 0 from the version's weights, with a new optimizer."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a new run that starts from any version of another: `lora-grpo train NEW --resume` goes on from there.

    It goes on exactly as the run did from that version, or with other settings: optimizer, schedule, random state and
    data position are the version's. RUN may be live, and stays as it is.
    """
    from lora_grpo.trainer.forking import fork as make

    made = make(run, version, new, overrides or (), weights_only=weights_only)
    if as_json:
        print_json(
            {"run": str(made.run), "version": made.origin.number, "digest": made.origin.digest, "step": made.step}
            | {"from": str(made.source), "weights": made.weights}
        )
    else:
        typer.echo(str(made))
        say(f"go on with: lora-grpo train {new} --resume")
