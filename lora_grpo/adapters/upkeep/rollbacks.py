"""A run's rollbacks, one JSON line each in `RUN/rollbacks.jsonl`: what a resume must know and no version can say.

A version's trainer state holds the data position and the learning rate of the time when it was published. A rollback
does not rewind the first and a guard may have lowered the second, so both are written down when it happens."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import STATE_FILE, Target
from lora_grpo.errors import StoreCorrupt, UnknownVersion

ROLLBACKS_FILE = "rollbacks.jsonl"


@dataclass(frozen=True, slots=True)
class Rollback:
    """One rollback: from version `left` to version `to`. `sampler` is the data position to go on from (None: unknown,
    the target's own); `learning_rate_scale` the factor on the configured one from then on; `reason` a guard's."""

    left: int
    to: int
    sampler: dict[str, int] | None
    learning_rate_scale: float = 1.0
    reason: str | None = None
    time: float = 0.0


class RollbackLog:
    """The rollbacks of one run, oldest first."""

    def __init__(self, run: Path) -> None:
        """Raises `StoreCorrupt` for a line that is no rollback."""
        self.path = run / ROLLBACKS_FILE
        self.entries = [_parse(line, self.path) for line in (disk.read_small(self.path) or b"").splitlines()]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def learning_rate_scale(self) -> float:
        return self.entries[-1].learning_rate_scale if self.entries else 1.0

    @property
    def reasons(self) -> list[str]:
        return [entry.reason for entry in self.entries if entry.reason is not None]

    @contextmanager
    def written(self, entry: Rollback) -> Iterator[None]:
        """`HEAD` moves inside: a rollback is written down before that, and taken back when it fails."""
        self._write([*self.entries, entry])
        try:
            yield
        except BaseException:
            self._write(self.entries[:-1])
            raise

    def settle(self, head: int | None) -> None:
        """Take back a last rollback that was killed before `HEAD` moved."""
        if self.entries and self.entries[-1].left == head != self.entries[-1].to:
            self._write(self.entries[:-1])

    def waits_at(self, head: int) -> bool:
        """Whether the last rollback led to `head` and nothing was published on top of it yet."""
        return bool(self.entries) and self.entries[-1].to == head

    def data_position(self, extra: Mapping[str, Any] | None) -> dict[str, int] | None:
        """Where the prompts go on, by a trainer state's `extra`; None where nothing tells, or a fork begins anew."""
        rolled_back = self.entries and (extra is None or int(extra["rollbacks"]) < len(self.entries))
        if rolled_back and self.entries[-1].sampler:
            return self.entries[-1].sampler
        return None if extra is None or extra["sampler"] is None else dict(extra["sampler"])

    def _write(self, entries: list[Rollback]) -> None:
        text = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        with disk.reported(f"writing {self.path}"):
            disk.replace_file(self.path, text.encode(), sync=True)
        self.entries = entries


def roll_back_stopped(store: AdapterStore, to: Target) -> Rollback:
    """Roll back a run that no trainer holds: `HEAD` moves at once, the trainer follows on resume. Where it is `HEAD`
    already nothing changes, but that without its trainer state, resume goes on from its rounded weights."""
    left, run = store.head, store.archive
    if left is None or run is None:
        raise UnknownVersion("no version was promoted yet, so there is none to roll back to")
    log = RollbackLog(run)
    log.settle(left.number)
    version = store.restore(to)
    sampler = log.data_position(state_extra(store, left.number))
    entry = Rollback(left.number, version.number, sampler, log.learning_rate_scale, time=time.time())
    if version == left and ("state" in store.where(left.number) or log.waits_at(left.number)):
        return entry
    with log.written(entry):
        store.promote(version)
    return entry


def of_trainer(extra: Any) -> dict[str, Any] | None:
    """What stands beside a state, if `GRPOTrainer` wrote it; a loop of the user's own keeps there what it likes."""
    return extra if isinstance(extra, dict) and {"sampler", "rollbacks"} <= extra.keys() else None


def ancestors(store: AdapterStore, number: int) -> Iterator[int]:
    """The version and those that it comes from, kept or not, the nearest first."""
    following: int | None = number
    while following is not None:
        yield following
        following = store.parent_of(following)


def state_extra(store: AdapterStore, number: int) -> dict[str, Any] | None:
    """What `GRPOTrainer` wrote beside the state of version `number`, or else of its nearest ancestor that has one."""
    for one in ancestors(store, number):
        if (files := store.load_state(one)) is not None:
            return of_trainer(disk.parse_json(disk.read_small(files[STATE_FILE]) or b"{}").get("extra"))
    return None


def _parse(line: bytes, path: Path) -> Rollback:
    try:
        entry = Rollback(**disk.parse_json(line))
        if not (disk.is_number(entry.left) and disk.is_number(entry.to) and isinstance(entry.sampler, dict | None)):
            raise ValueError("its versions or its data position are none")
        if not entry.learning_rate_scale + entry.time >= 0:
            raise ValueError("its learning rate or its time is no number")
        return entry
    except (ValueError, TypeError) as error:
        raise StoreCorrupt(f"{path} holds a line that is not a rollback ({line[:60]!r}): {error}; remove it") from error
