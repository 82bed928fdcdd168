"""`lora-grpo init MODEL --data DATA`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import Overrides
from lora_grpo.cli.output import say
from lora_grpo.errors import ConfigError


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A base model's hub name or directory.")],
    overrides: Overrides = None,
    data: Annotated[
        str, typer.Option("--data", "-d", help="The prompts: a .jsonl, .json, .csv or .parquet file, or a hub name.")
    ] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, which must not be there yet.")] = Path(
        "run.toml"
    ),
) -> None:
    """Write a config file for a model and a data set, each setting with its reason, and check it.

    Exit code 2 if `lora-grpo check` would find what ends the run here, such as too little memory; the file says it too.
    """
    from lora_grpo.trainer.checking import check_run
    from lora_grpo.trainer.proposing import memory_lines, propose

    if out.exists():
        raise ConfigError(f"{out} is there already; name another file with --out, or remove it")
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
