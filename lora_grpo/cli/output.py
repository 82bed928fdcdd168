"""Printing: tables and JSON to stdout, everything said to a person meanwhile to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 160


def print_json(document: Any) -> None:
    """One JSON document on one line; what is not finite becomes null, so that every parser takes it."""
    typer.echo(json.dumps(_finite(document), ensure_ascii=False, default=str, allow_nan=False))


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Rows as a table, in every column that a row has."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table(rows, title))


def tell(document: Any, as_json: bool, text: str) -> None:
    """A command's result, for a program or for a person."""
    if as_json:
        print_json(document)
    else:
        typer.echo(text)


def tell_rows(document: Any, as_json: bool, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The same where people get a table."""
    if as_json:
        print_json(document)
    else:
        print_table(rows, title)


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """What `print_table` prints."""
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: any(isinstance(row.get(name), int | float) for row in rows) for name in names}
    made = Table(title=Text(title), title_justify="left")
    for name in names:
        made.add_column(name, justify="right" if numeric[name] else "left")
    for row in rows:
        made.add_row(*(Text(_cell(row.get(name))) for name in names))
    return made


def say(text: str) -> None:
    """A line for the person, on stderr."""
    typer.echo(text, err=True)


def say_error(error: Exception) -> None:
    """One sentence on stderr, with the notes that were added on the way."""
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(str(error), err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(f"       {note}", err=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
