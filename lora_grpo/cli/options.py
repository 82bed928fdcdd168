"""What commands share: arguments, a run's store to read, printing (tables and JSON to stdout, the rest to stderr)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from lora_grpo.metrics.log import jsonable
from lora_grpo.metrics.render import table

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore


def keys_begun(begun: str) -> list[str]:
    from lora_grpo.config_file import describe_settings

    return [f"{setting.key}=" for setting in describe_settings() if setting.key.startswith(begun)]


A_VERSION = "12 or v12, head, parent, best, best:METRIC (the highest) or best:-METRIC (the lowest)."
Version = Annotated[str, Argument(metavar="VERSION", help=A_VERSION)]
Run = Annotated[Path, Argument(metavar="RUN", help="A run directory, such as runs/gsm8k.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document on stdout.")]
Temperature = Annotated[float | None, Option(min=0, help="0 is greedy; default: the run's.")]
_REPLACED = "Settings that replace those of the file: grpo.beta=0.1 rewards.0.weight=2"
Overrides = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help=_REPLACED, autocompletion=keys_begun)]


def opened(run: Path) -> AdapterStore:
    from lora_grpo.adapters.store import AdapterStore

    return AdapterStore(archive=run, readonly=True)


def integers(text: str | None, option: str) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(f"{option} {text!r} must be whole numbers, such as 8,16,64")
    return [int(part) for part in parts]


def print_json(document: Any) -> None:
    """One JSON document on one line; what is not finite becomes null, so that every parser takes it."""
    typer.echo(json.dumps(jsonable(document), ensure_ascii=False))


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, title))


def tell(document: Any, as_json: bool, said: str | Sequence[Mapping[str, Any]], title: str = "") -> None:
    """A command's result: the document for a program, for a person a text or the rows of a table."""
    if as_json:
        print_json(document)
    elif isinstance(said, str):
        typer.echo(said)
    else:
        print_table(said, title)


def say(text: str) -> None:
    typer.echo(text, err=True)


def say_error(error: Exception | str) -> None:
    """One sentence on stderr, with the notes that were added to an error on the way."""
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    for line in (str(error), *(f"       {note}" for note in getattr(error, "__notes__", ()))):
        say(line)
