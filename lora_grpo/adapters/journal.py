"""The journal: one JSON event a line, appended in one system call each.

A kill can tear only the last line; a reader leaves a torn tail alone, the next writer cuts it off.
"""

from __future__ import annotations

import errno
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_grpo.adapters.disk import reported
from lora_grpo.adapters.layout import Manifest
from lora_grpo.errors import ConfigError


class Journal:
    """The events of a run, and what they add up to.

    `published` maps the numbers of versions that should have a copy to their manifests; `forgotten` are numbers whose
    last copy was removed on purpose, or whose loss was reported; `promoted` lists promotions in order; `states` are
    the trainer states written or on their way.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path = path
        self.published: dict[int, Manifest] = {}
        self.forgotten: set[int] = set()
        self.promoted: list[int] = []
        self.pins: set[int] = set()
        self.states: set[int] = set()
        self.metrics: dict[int, dict[str, Any]] = {}
        self.damaged_lines = 0
        self._sync = sync
        self._descriptor: int | None = None
        self._end = 0

    def refresh(self) -> None:
        """Take in the complete lines that were added since the last look."""
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self._end)
                added = stream.read()
        except FileNotFoundError:
            return
        complete = added[: added.rfind(b"\n") + 1]
        self._end += len(complete)
        for line in complete.splitlines():
            self._take(line)

    def open_for_writing(self) -> None:
        """Take in all events, cut off a line torn by a kill, and keep the file open for appending."""
        with reported(f"opening {self.path}"):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self.refresh()
            os.ftruncate(self._descriptor, self._end)

    def knows(self, number: int) -> bool:
        """Whether such a version was ever published."""
        return number in self.published or number in self.forgotten

    def append(self, event: str, number: int, **fields: Any) -> None:
        """Write one event. Safe from a kill when it returns; from a power cut after `make_durable`."""
        assert self._descriptor is not None
        line = json.dumps({"event": event, "number": number, **fields}, separators=(",", ":")).encode() + b"\n"
        with reported(f"writing {event!r} of version {number} to {self.path}"):
            if os.write(self._descriptor, line) < len(line):
                os.ftruncate(self._descriptor, self._end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            if self._sync:
                os.fsync(self._descriptor)
        self._end += len(line)
        self._take(line)

    def make_durable(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, line: bytes) -> None:
        try:
            fields = json.loads(line)
            event, number = fields["event"], int(fields["number"])
            self._apply(event, number, fields)
        except (ValueError, KeyError, TypeError):
            self.damaged_lines += 1

    def _apply(self, event: str, number: int, fields: dict[str, Any]) -> None:
        match event:
            case "publish":
                self.published[number] = Manifest.from_mapping(fields)
                self.forgotten.discard(number)
            case "promote":
                self.promoted.append(number)
            case "record":
                self.metrics.setdefault(number, {}).update(fields["metrics"])
            case "pin":
                self.pins.add(number)
            case "unpin":
                self.pins.discard(number)
            case "forget":
                self.forgotten.add(number)
                self.published.pop(number, None)
            case "state":
                self.states.add(number)
            case "forget_state":
                self.states.discard(number)


def as_metrics(values: Mapping[str, object]) -> dict[str, Any]:
    """Metrics as the journal holds them: whole and floating numbers, text, truth values, None."""
    return {name: _as_metric(name, value) for name, value in values.items()}


def _as_metric(name: str, value: object) -> Any:
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ConfigError(f"metric {name}={value!r} must be a number, text, a truth value or None (a tensor's is .item())")
