"""Rows from where they are: the hub, JSONL, JSON, CSV and Parquet files, folders of `save_to_disk`, lists of dicts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_grpo.errors import ConfigError, counted

if TYPE_CHECKING:
    from datasets import Dataset

Rows: TypeAlias = "Sequence[Mapping[str, Any]] | Dataset"

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_KINDS = f"for a local file give a path that ends in {', '.join(FILE_SUFFIXES)}"


def read_rows(source: str | Path | Rows, split: str, name: str | None) -> tuple[Rows, str]:
    """The rows, and what to call them in errors."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if (path / "state.json").is_file():
            return _from_folder(path), str(path)
        if path.suffix.lower() not in FILE_SUFFIXES:
            if path.is_file():
                raise ConfigError(f"{path} is a file of a kind that is not read here; {_KINDS}")
            return _from_hub(str(source), split, name), f"dataset {str(source)!r} (split {split!r})"
        if not path.is_file():
            raise ConfigError(f"no such data file: {path.absolute()}")
        readers = {".parquet": _from_parquet, ".csv": _from_csv}
        return readers.get(path.suffix.lower(), _from_json)(path), str(path)
    if isinstance(source, Mapping):
        raise ConfigError(f"the data is a mapping, not rows; choose one of its splits: {', '.join(map(repr, source))}")
    if hasattr(source, "column_names") and hasattr(source, "select"):
        return source, "the dataset"
    if not hasattr(source, "__len__"):
        fix = "pass a datasets.Dataset or a list (of a stream, list(itertools.islice(stream, 10_000)))"
        raise ConfigError(f"a {type(source).__name__} cannot be counted, which shuffling and resuming need: {fix}")
    rows = list(source)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(f"the data, row {index}: {short(row)} is not a dict of columns")
    return rows, "the data"


def _from_hub(name: str, split: str, configuration: str | None) -> Dataset:
    from datasets import load_dataset

    from lora_grpo.hub import out_of_reach

    why = "" if Path(name).is_dir() else out_of_reach()
    try:
        return load_dataset(name, configuration, split=split)
    except (OSError, ValueError) as error:
        reason = why or (str(error).splitlines() or [type(error).__name__])[0]
        at = f"split={split!r}" + (f", name={configuration!r}" if configuration else "")
        raise ConfigError(f"cannot load dataset {name!r} ({at}): {reason.removesuffix('.')}; {_KINDS}") from error


def _from_folder(path: Path) -> Rows:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except IndexError:  # it has no files, as one of no rows is written
        return []
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no complete folder of Dataset.save_to_disk: {error}") from error


def _from_parquet(path: Path) -> Rows:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow.parquet import read_metadata

    try:
        # By itself it takes batches as large as the first row group, which may have no rows.
        return Dataset.from_parquet(str(path), batch_size=1000) if read_metadata(path).num_rows else []
    except (DatasetGenerationError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error.__cause__ or error}") from error


def _from_json(path: Path) -> list[dict[str, Any]]:
    """One object a line, or one array of objects.

    Read here and not through Arrow, which gives a column one type: it refuses answers that are now text, now numbers,
    and fills nested messages with keys that other rows have."""
    text = _text(path)
    if text.lstrip().startswith("["):
        found = [(f"{path}, row {index}", row) for index, row in enumerate(_json(text, str(path)))]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(at, _json(line, at)) for at, line in lines]
    for at, row in found:
        if not isinstance(row, dict):
            raise ConfigError(f"{at}: {short(row)} is no JSON object with columns as keys")
    return [row for _, row in found]


def _from_csv(path: Path) -> list[dict[str, Any]]:
    """One row a record, the first of them the columns' names; every value is text."""
    text = _text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        names = next(reader, [])
        if not all(names) or len({*names}) != len(names):
            raise ConfigError(f"{path}: the first line must name each column once; it is {short(names)}")
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
            raise ConfigError(f"{path}: its columns lie between {other!r}; put commas there")
        for values in filter(None, reader):
            if len(values) != len(names):
                found = f"line {reader.line_num}: {counted(len(values), 'value')} for {counted(len(names), 'column')}"
                raise ConfigError(f"{path}, {found}; put a value that holds a comma or a line break in double quotes")
            rows.append(dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv -t UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        wanted = "a file holds one object a line, or one array of objects"
        raise ConfigError(f"{where}: JSON that cannot be read: {said} ({wanted})") from error


def short(value: object, width: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
