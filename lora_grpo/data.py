"""Prompts: where they come from, and in which order a run uses them.

A prompt is text or a list of chat messages; every other column of its row is handed to the reward functions.
Everything is checked when it is loaded, so that row 5,000 does not end a run after hours.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np

from lora_grpo.config import DataConfig
from lora_grpo.errors import ConfigError
from lora_grpo.types import Message, Prompt, derive_seed

if TYPE_CHECKING:
    from datasets import Dataset

Rows: TypeAlias = "Sequence[Mapping[str, Any]] | Dataset"

RESERVED_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Names under which reward functions get something else."""

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class PromptDataset:
    """Checked prompts with their other columns; `rows` stays where it is (memory-mapped for `datasets`)."""

    rows: Rows
    prompt_column: str
    column_names: tuple[str, ...]
    system_prompt: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, index: int) -> Prompt:
        """The prompt of one row, as chat messages if the data or `system_prompt` make it a chat."""
        return _as_prompt(self.rows[index][self.prompt_column], self.system_prompt)

    def select(self, indices: Sequence[int]) -> tuple[list[Prompt], dict[str, list[Any]]]:
        """`(prompts_P, columns)`: each column is a list of P values, None where a row lacks it."""
        rows = [self.rows[index] for index in indices]
        prompts = [_as_prompt(row[self.prompt_column], self.system_prompt) for row in rows]
        return prompts, {name: [row.get(name) for row in rows] for name in self.column_names}


class SamplerState(TypedDict):
    """Where a `PromptSampler` stands, as plain numbers."""

    epoch: int
    offset: int
    num_prompts: int
    seed: int


class PromptSampler:
    """Indices of P prompts a step, in epochs that are shuffled anew and hold every prompt exactly once.

    The order depends on `seed` and the epoch alone, on every machine, and the whole state is `(epoch, offset)`, so a
    resumed run draws what the uninterrupted one would have. A step that reaches an epoch's end goes on in the next.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int) -> None:
        if num_prompts < 1 or prompts_per_step < 1:
            raise ConfigError(
                f"num_prompts={num_prompts} and prompts_per_step={prompts_per_step} must both be at least 1"
            )
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.epoch = 0
        self.offset = 0
        self._order = self._shuffled(0)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The indices of the next step's prompts; never ends."""
        indices: list[int] = []
        while len(indices) < self.prompts_per_step:
            taken = self._order[self.offset : self.offset + self.prompts_per_step - len(indices)]
            indices.extend(taken)
            self.offset += len(taken)
            if self.offset == self.num_prompts:
                self._move_to(self.epoch + 1, 0)
        return indices

    @property
    def epochs(self) -> float:
        """Epochs done so far, with the fraction."""
        return self.epoch + self.offset / self.num_prompts

    def state_dict(self) -> SamplerState:
        return SamplerState(epoch=self.epoch, offset=self.offset, num_prompts=self.num_prompts, seed=self.seed)

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on from `state`; refuses one of another dataset size or seed, whose order would be another."""
        saved, here = (state["num_prompts"], state["seed"]), (self.num_prompts, self.seed)
        if saved != here:
            raise ConfigError(
                f"cannot resume the prompts: the saved run had (num_prompts, seed) = {saved}, this one has {here}; "
                "resume with the data and seed of the saved run"
            )
        self._move_to(state["epoch"], state["offset"])

    def _move_to(self, epoch: int, offset: int) -> None:
        if epoch != self.epoch:
            self._order = self._shuffled(epoch)
        self.epoch, self.offset = epoch, offset

    def _shuffled(self, epoch: int) -> list[int]:
        # Raw words of a bit generator are fixed by NumPy's compatibility policy; `Generator.permutation` is not.
        keys = np.random.PCG64(derive_seed(self.seed, epoch)).random_raw(self.num_prompts)
        order: list[int] = np.argsort(keys, kind="stable").tolist()
        return order


def load_data(config: DataConfig) -> tuple[PromptDataset, PromptDataset | None]:
    """The training and held-out prompts of a run's settings."""
    shared: dict[str, Any] = {
        "name": config.name,
        "prompt_column": config.prompt_column,
        "system_prompt": config.system_prompt,
    }
    train = load_prompts(config.train, split=config.train_split, **shared)
    if config.eval is None:
        return train, None
    return train, load_prompts(config.eval, split=config.eval_split, limit=config.eval_limit, **shared)


def load_prompts(
    source: str | Path | Rows,
    *,
    split: str = "train",
    name: str | None = None,
    prompt_column: str = "prompt",
    system_prompt: str | None = None,
    limit: int | None = None,
) -> PromptDataset:
    """Prompts from a hub name, a JSONL, JSON or Parquet file, a `datasets.Dataset` or a list of dicts.

    `split` and `name` (the hub's configuration) are for hub names; `limit` keeps the first rows.
    `system_prompt` makes chats of text prompts and is put before chats; "" makes chats without a system message.
    Raises `ConfigError` naming file, row and column.
    """
    rows, label = _read(source, split, name)
    if limit is not None and limit < len(rows):
        rows = rows[:limit] if isinstance(rows, list) else rows.select(range(limit))  # type: ignore[union-attr]
    if not len(rows):
        raise ConfigError(f"{label} has no rows")
    columns = _column_names(rows)
    if prompt_column not in columns:
        raise ConfigError(_missing_column(label, prompt_column, columns))
    taken = sorted(RESERVED_COLUMNS.intersection(columns) - {prompt_column})
    if taken:
        raise ConfigError(f"{label}: column {taken[0]!r} is a name that reward functions get otherwise; rename it")
    _check_prompts(rows, label, prompt_column, system_prompt)
    others = tuple(column for column in columns if column != prompt_column)
    return PromptDataset(rows, prompt_column, others, system_prompt)


def _read(source: str | Path | Rows, split: str, name: str | None) -> tuple[Rows, str]:
    """The rows, and what to call them in errors."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix.lower() not in FILE_SUFFIXES:
            return _from_hub(str(source), split, name), f"dataset {str(source)!r} (split {split!r})"
        if not path.is_file():
            raise ConfigError(f"no such data file: {path.absolute()}")
        read = _from_parquet if path.suffix.lower() == ".parquet" else _from_json
        return read(path), str(path)
    if isinstance(source, Mapping):
        splits = ", ".join(map(repr, source))
        raise ConfigError(f"the data is a mapping, not rows; choose one of its splits: {splits}")
    if hasattr(source, "column_names") and hasattr(source, "select"):
        return source, "the dataset"
    rows = list(source)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(f"the data, row {index}: {_short(row)} is no dict of columns")
    return rows, "the data"


def _from_hub(name: str, split: str, configuration: str | None) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(name, configuration, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = f"split={split!r}" + (f", name={configuration!r}" if configuration else "")
        raise ConfigError(
            f"cannot load dataset {name!r} ({at}): {reason}. For a local file give a path that ends in "
            f"{', '.join(FILE_SUFFIXES)}"
        ) from error


def _from_parquet(path: Path) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_parquet(str(path))
    except (DatasetGenerationError, ValueError) as error:
        raise ConfigError(f"{path} is no readable Parquet file: {error.__cause__ or error}") from error


def _from_json(path: Path) -> list[dict[str, Any]]:
    """One object a line, or one array of objects.

    Read here and not through Arrow, which gives a column one type: it refuses answers that are now text, now numbers,
    and fills nested messages with keys that other rows have.
    """
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        rows: list[dict[str, Any]] = _json(text, str(path))
        where = [f"{path}, row {index}" for index in range(len(rows))]
    else:
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        where = [f"{path}, line {number}" for number, _ in numbered]
        rows = [_json(line, at) for at, (_, line) in zip(where, numbered, strict=True)]
    for at, row in zip(where, rows, strict=True):
        if not isinstance(row, dict):
            raise ConfigError(f"{at}: {_short(row)} is no JSON object with columns as keys")
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error


def _column_names(rows: Rows) -> tuple[str, ...]:
    if isinstance(rows, list):
        return tuple(dict.fromkeys(str(key) for row in rows for key in row))
    return tuple(rows.column_names)  # type: ignore[union-attr]


def _missing_column(label: str, column: str, columns: tuple[str, ...]) -> str:
    chats = ["messages"] if "messages" in columns else []
    near = chats or difflib.get_close_matches(column, columns, n=1)
    hint = f"; prompt_column = {near[0]!r}?" if near else "; name the one that holds the prompts in prompt_column"
    return f"{label} has no column {column!r}; its columns are {', '.join(map(repr, columns))}{hint}"


def _check_prompts(rows: Rows, label: str, column: str, system_prompt: str | None) -> None:
    # Only the prompt column: decoding every column of a large dataset would cost minutes.
    narrow = rows if isinstance(rows, list) else rows.select_columns([column])  # type: ignore[union-attr]
    for index, row in enumerate(narrow):
        problem = _problem(row.get(column), system_prompt)
        if problem:
            raise ConfigError(f"{label}, row {index}, column {column!r}: {problem}")


def _problem(value: Any, system_prompt: str | None) -> str | None:
    """What is wrong with one prompt, with the fix; None if nothing is."""
    if isinstance(value, str):
        return None if value else "the prompt is empty; remove the row"
    if not isinstance(value, list) or not value:
        return f"a prompt is text or a list of chat messages, not {_short(value)}"
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"a chat message needs 'role' and 'content', but one is {_short(message)}"
    if value[-1]["role"] == "assistant":
        return "the chat ends with the assistant's message; leave out the answer, so that the model gives one"
    if system_prompt and value[0]["role"] == "system":
        return "the chat has a system message of its own; leave out data.system_prompt, or the message"
    return None


def _as_prompt(value: Any, system_prompt: str | None) -> Prompt:
    if isinstance(value, str):
        if system_prompt is None:
            return value
        messages: list[Message] = [{"role": "user", "content": value}]
    else:
        # Arrow gives every message the keys of all; a chat template would take a None for something said.
        messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    return [{"role": "system", "content": system_prompt}, *messages] if system_prompt else messages


def _short(value: object, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
