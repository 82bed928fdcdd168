"""Prompts: rows as checked prompts with their columns, and the order in which a run uses them.

A prompt is text or a list of chat messages; every other column of its row is handed to the reward functions.
Everything is checked when it is loaded, so that row 5,000 does not end a run after hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_grpo.config import DataConfig
from lora_grpo.data.reading import Rows as Rows
from lora_grpo.data.reading import read_rows, short
from lora_grpo.errors import ConfigError
from lora_grpo.types import Chat, Prompt, derive_seed, text_problem

RESERVED_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Names under which reward functions get something else."""

TEMPLATE_COLUMN = "chat_template_kwargs"  # what one row's chat template gets besides the messages


@dataclass(frozen=True)
class PromptDataset:
    """Checked prompts with their other columns; `rows` stays where it is (memory-mapped for `datasets`).

    `label` is what errors call it. `chat_template_kwargs` go to the chat template of every chat; those in a row's
    column of that name go before them."""

    rows: Rows
    prompt_column: str
    column_names: tuple[str, ...]
    system_prompt: str | None = None
    label: str = "the data"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> tuple[list[Prompt], dict[str, list[Any]]]:
        """`(prompts_P, columns)`: each column is a list of P values, None where a row lacks it."""
        rows = [self.rows[index] for index in indices]
        return list(map(self._as_prompt, rows)), {name: [row.get(name) for row in rows] for name in self.column_names}

    def prompts(self) -> Iterator[Prompt]:
        """The prompt of every row, in order, as chat messages if the data or `system_prompt` make it a chat."""
        return map(self._as_prompt, _narrow(self.rows, self.prompt_column))

    def only(self, indices: Sequence[int]) -> PromptDataset:
        return replace(self, rows=_taken(self.rows, indices))

    def _as_prompt(self, row: Mapping[str, Any]) -> Prompt:
        value = row[self.prompt_column]
        if isinstance(value, str):
            if self.system_prompt is None:
                return value
            value = [{"role": "user", "content": value}]
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        own = _without_none(row.get(TEMPLATE_COLUMN) or {})
        return Chat([*system, *map(_without_none, value)], {**self.chat_template_kwargs, **own})


def load_data(config: DataConfig) -> tuple[PromptDataset, PromptDataset | None]:
    """The training and held-out prompts of a run's settings."""
    shared = config.model_dump(include={"name", "prompt_column", "system_prompt"})
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
    """Prompts from a hub name, a JSONL, JSON, CSV or Parquet file, a folder of `Dataset.save_to_disk`, a
    `datasets.Dataset` or a list of dicts.

    `split` and `name` (the hub's configuration) are for hub names; `limit` keeps the first rows.
    `system_prompt` makes chats of text prompts and is put before chats; "" makes chats without a system message.
    Raises `ConfigError` naming file, row and column."""
    rows, label = read_rows(source, split, name)
    if limit is not None and limit < len(rows):
        rows = _taken(rows, range(limit))
    if not len(rows):
        raise ConfigError(f"{label} has no rows")
    columns = getattr(rows, "column_names", None) or [*dict.fromkeys(str(key) for row in rows for key in row)]
    if prompt_column not in columns:
        names = f"its columns are {', '.join(map(repr, columns))}"
        raise ConfigError(f"{label} has no column {prompt_column!r}; {names}: name one in prompt_column")
    if taken := sorted(RESERVED_COLUMNS.intersection(columns) - {prompt_column}):
        raise ConfigError(f"{label}: column {taken[0]!r} has the name of another reward argument; rename it")
    _check_prompts(rows, label, prompt_column, system_prompt)
    others = tuple(column for column in columns if column != prompt_column)
    return PromptDataset(rows, prompt_column, others, system_prompt, label)


def _taken(rows: Rows, indices: Sequence[int]) -> Rows:
    return [rows[i] for i in indices] if isinstance(rows, list) else rows.select(indices)  # type: ignore[union-attr]


def _check_prompts(rows: Rows, label: str, column: str, system_prompt: str | None) -> None:
    for index, row in enumerate(_narrow(rows, column)):
        problem, where = prompt_problem(row.get(column), system_prompt), column
        if not problem:
            chat = system_prompt is not None or not isinstance(row[column], str)
            problem, where = _template_problem(row.get(TEMPLATE_COLUMN), chat), TEMPLATE_COLUMN
        if problem:
            raise ConfigError(f"{label}, row {index}, column {where!r}: {problem}")


def _narrow(rows: Rows, column: str) -> Rows:
    """Only what a prompt is made of: decoding every column of a large dataset would cost minutes."""
    if isinstance(rows, list):
        return rows
    return rows.select_columns([name for name in rows.column_names if name in (column, TEMPLATE_COLUMN)])  # type: ignore[union-attr]


def _template_problem(value: Any, chat: bool) -> str | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return f"it holds what the chat template gets, such as {{'enable_thinking': false}}, not {short(value)}"
    return None if chat else "the prompt is text, which goes through no chat template; set data.system_prompt = ''"


def prompt_problem(value: Any, system_prompt: str | None = None) -> str | None:
    """What is wrong with one prompt, with the fix; None if nothing is."""
    if isinstance(value, str):
        return text_problem(value) if value.strip() else "the prompt is empty; remove the row"
    if not isinstance(value, list) or not value:
        return f"a prompt is text or a list of chat messages, not {short(value)}"
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"a chat message needs 'role' and 'content', but one is {short(message)}"
        if problem := text_problem(str(message.get("content"))):
            return problem
    if value[-1]["role"] == "assistant":
        return "the chat ends with the assistant's message; leave out the answer, so that the model gives one"
    if system_prompt and value[0]["role"] == "system":
        return "the chat already has a system message; leave out data.system_prompt or the message"
    return None


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives every message the keys of all; a chat template would take a None for something said."""
    return {key: item for key, item in values.items() if item is not None}


class PromptSampler:
    """Indices of P prompts a step, in epochs that are shuffled anew and hold every prompt exactly once.

    The order depends on `seed` and the epoch alone, on every machine, and the whole state is `(epoch, offset)`, so a
    resumed run draws what the uninterrupted one would have. A step that reaches an epoch's end goes on in the next."""

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int) -> None:
        self.num_prompts, self.prompts_per_step, self.seed = num_prompts, prompts_per_step, seed
        self.epoch, self.offset = 0, 0
        self._order = self._shuffled(0)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        indices: list[int] = []
        while len(indices) < self.prompts_per_step:
            taken = self._order[self.offset : self.offset + self.prompts_per_step - len(indices)]
            indices.extend(taken)
            self.offset += len(taken)
            if self.offset == self.num_prompts:
                self._move_to(self.epoch + 1, 0)
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "offset": self.offset, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`; refuses one of another dataset size or seed, whose order would be another."""
        saved, here = (state["num_prompts"], state["seed"]), (self.num_prompts, self.seed)
        if saved != here:
            was = f"(num_prompts, seed) was {saved}, now it is {here}"
            raise ConfigError(f"cannot resume: {was}; take the saved run's data and seed")
        self._move_to(state["epoch"], state["offset"])

    def _move_to(self, epoch: int, offset: int) -> None:
        if epoch != self.epoch:
            self._order = self._shuffled(epoch)
        self.epoch, self.offset = epoch, offset

    def _shuffled(self, epoch: int) -> list[int]:
        # Raw words of a bit generator are fixed by NumPy's compatibility policy; `Generator.permutation` is not.
        keys = np.random.PCG64(derive_seed(self.seed, epoch)).random_raw(self.num_prompts)
        return np.argsort(keys, kind="stable").tolist()
