"""`lora-grpo check CONFIG|MODEL`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lora_grpo.cli.output import print_json, print_table


def check(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|MODEL", help="A TOML file, a run's directory, or a model's name or directory."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the file's, or of the defaults."),
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Start the engine too: base match, probe, slots, three swaps.")
    ] = False,
    rewards: Annotated[
        bool, typer.Option("--rewards", help="Call each reward function once, on two rows with a stand-in completion.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """Find what would end a run, without training it: settings, data, adapter, memory; exit code 2 if something would.

    With a MODEL the adapter and engine are the default settings'. Nothing is written.
    """
    from lora_grpo.config_file import config_of_model, load_config, names_a_model

    alone = names_a_model(target)
    config = config_of_model(target, overrides or ()) if alone else load_config(target, overrides or ())
    from lora_grpo.trainer.checking import check_run

    findings = [asdict(finding) for finding in check_run(config, engine=engine, rewards=rewards, base_alone=alone)]
    if as_json:
        print_json(findings)
    else:
        print_table([{**row, "ok": "yes" if row["ok"] else "NO"} for row in findings], f"check of {target}")
    if not all(row["ok"] for row in findings):
        raise typer.Exit(2)
