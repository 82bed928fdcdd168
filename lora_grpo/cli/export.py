"""`lora-grpo export RUN VERSION DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import Json, Run, Version
from lora_grpo.cli.output import print_json


def export(
    run: Run,
    version: Version,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    as_json: Json = False,
) -> None:
    """Write a version as a plain PEFT folder, for PeftModel.from_pretrained, vLLM, or further training.

    It has the adapter's own rank, alpha and targets, so that training on keeps the effective learning rate. The weights
    are the trainer's own in fp32 where the version's trainer state is kept, else rounded to the engine's dtype.
    """
    from lora_grpo.adapters.peft_form.export import Recipe, export_adapter
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
        found = store.get(version)
        weights = export_adapter(store, found, Recipe.read(run), directory)
    if as_json:
        print_json({"version": found.number, "directory": str(directory), "weights": weights})
    else:
        typer.echo(f"{found} is in {directory}, weights {weights}")
