"""`lora-grpo check CONFIG|MODEL`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from lora_grpo.cli.live import Json, Overrides
from lora_grpo.cli.output import tell_rows
from lora_grpo.errors import ConfigError


def check(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|MODEL", help="A TOML file, a run's directory, or a model's name or directory."),
    ],
    overrides: Overrides = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Start the engine too: base match, probe, slots, three swaps.")
    ] = False,
    rewards: Annotated[
        bool, typer.Option("--rewards", help="Call each reward function once, on two rows with a stand-in completion.")
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="For a MODEL of which only the config is there: draw its weights."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Find what would end a run, without training it: settings, data, adapter, memory; exit code 2 if something would.

    With a MODEL the adapter and engine are the default settings'. Nothing is written.
    """
    from lora_grpo.config_file import config_of_model, load_config, names_a_model

    alone = names_a_model(target)
    if random_weights and not alone:
        raise ConfigError(f"--random-weights is for a model's name or directory, and {target} is a run's settings")
    from lora_grpo.trainer.checking import check_run
    from lora_grpo.trainer.random_base import random_base

    with random_base(target) if random_weights else nullcontext(target) as model:
        config = config_of_model(model, overrides or ()) if alone else load_config(target, overrides or ())
        found = check_run(config, engine=engine, rewards=rewards, base_alone=alone)
        findings = [{**asdict(finding), "found": finding.found.replace(model, target)} for finding in found]
    rows = [{**row, "ok": "yes" if row["ok"] else "NO"} for row in findings]
    tell_rows(findings, as_json, rows, f"check of {target}")
    if not all(row["ok"] for row in findings):
        raise typer.Exit(2)
