"""The journal, and the manifests of what was published: one JSON event a line, appended in one system call each.

A kill can tear only the last line: a reader leaves it alone, the next writer cuts it off. Each ends with a CRC-32."""

import errno
import json
import math
import numbers
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files.disk import folder_name, is_number, parse_json, read_record, read_small, reported
from lora_grpo.adapters.version import MANIFEST_FILE, PEFT_FILES, AdapterVersion
from lora_grpo.errors import ConfigError, StoreCorrupt
from lora_grpo.types import LARGEST_REWARD

_DAMAGE = (ValueError, KeyError, TypeError)
_CHECKED = re.compile(rb'(.*),"crc":"([0-9a-f]{8})"}', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Manifest:
    number: int
    parent: int | None
    digest: str
    step: int
    created_at: float
    sizes: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.fields(), indent=1) + "\n").encode()

    def version(self, path: Path) -> AdapterVersion:
        return AdapterVersion(self.number, self.parent, path, self.digest, self.step, self.created_at)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Manifest":
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no manifest."""
        manifest = cls(**{name: values[name] for name in cls.__slots__})
        sizes = manifest.sizes
        if not (
            is_number(manifest.number)
            and (manifest.parent is None or is_number(manifest.parent))
            and (type(manifest.digest), type(manifest.step), type(sizes)) == (str, int, dict)
            and abs(manifest.created_at) < 1e11  # what is not finite is not below it either
            and sizes.keys() == set(PEFT_FILES)
            and all(type(size) is int and size >= 0 for size in sizes.values())
        ):
            raise ValueError("its fields are not the fields of a version")
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a version's folder; `StoreCorrupt` for a damaged one, and where there is none."""
    path = folder / MANIFEST_FILE
    if (manifest := read_record(path, Manifest.from_mapping)) is None:
        raise StoreCorrupt(f"{path} is gone; did another program delete it?")
    if folder_name(manifest.number) != folder.name:
        raise StoreCorrupt(f"{path} says it is version {manifest.number}, but its folder is {folder.name}")
    return manifest


class Journal:
    """The events of a run, and what they add up to.

    `published` has the manifests of the versions that should have a copy, `metrics` what was recorded of those;
    `parents` every version ever published, which of one that is gone is all that stays in memory; `promoted` the ones
    that were promoted, in the order of their last promotion, and the last one even if it is gone; `states` the trainer
    states written or on their way; `damaged_lines` those, counted from 1, that could not be read."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path, self._sync = path, sync
        self.published: dict[int, Manifest] = {}
        self.promoted: dict[int, None] = {}
        self.pins, self.states = set[int](), set[int]()
        self.metrics: dict[int, dict[str, Any]] = {}
        self.damaged_lines: list[int] = []
        self.parents: dict[int, int | None] = {}
        self._descriptor: int | None = None
        self._lines = self._end = 0

    def refresh(self) -> None:
        added = read_small(self.path, self._end) or b""
        complete = added[: added.rfind(b"\n") + 1]
        self._end += len(complete)
        for line in complete.split(b"\n")[:-1]:
            self._take(line)

    def open_for_writing(self) -> None:
        with reported(f"opening {self.path}"):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
            self.refresh()
            os.ftruncate(self._descriptor, self._end)

    def has_forgotten(self, number: int) -> bool:
        """Whether a version's last copy was removed on purpose, or its loss reported."""
        return number in self.parents and number not in self.published

    def metrics_of(self, number: int) -> dict[str, Any]:
        if not self.has_forgotten(number):
            return dict(self.metrics.get(number, {}))
        found: dict[str, Any] = {}
        for fields in self._lines_of("record", number):
            with suppress(*_DAMAGE):
                found.update(fields["metrics"])
        return found

    def why_forgotten(self, number: int) -> str | None:
        """What was kept in its stead when a version was last removed; None where it was lost, or nothing tells."""
        return next(reversed([fields.get("why") for fields in self._lines_of("forget", number)]), None)

    def _lines_of(self, event: str, number: int) -> Iterator[dict[str, Any]]:
        wanted = b'{"event":"%s","number":%d,' % (event.encode(), number)
        for line in (read_small(self.path) or b"")[: self._end].split(b"\n")[:-1]:
            # Parsing every line would take seconds in a long run, for each version that is asked for.
            if line.startswith(wanted):
                with suppress(*_DAMAGE):
                    yield _parsed(line)[2]

    def append(self, event: str, number: int, **fields: Any) -> None:
        """Write one event. Safe from a kill when it returns; from a power cut after `make_durable`."""
        assert self._descriptor is not None
        body = json.dumps({"event": event, "number": number, **fields}, separators=(",", ":")).encode()[:-1]
        line = body + b',"crc":"%08x"}\n' % zlib.crc32(body)
        with reported(f"writing {event!r} of version {number} to {self.path}"):
            try:
                if os.write(self._descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                if self._sync:
                    os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, self._end)
                raise
        self._end += len(line)
        self._take(line[:-1])

    def make_durable(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, line: bytes) -> None:
        self._lines += 1
        try:
            self._apply(*_parsed(line))
        except _DAMAGE:
            self.damaged_lines.append(self._lines)

    def _apply(self, event: str, number: int, fields: dict[str, Any]) -> None:
        promoted = next(reversed(self.promoted), None)
        match event:
            case "publish":
                manifest = Manifest.from_mapping(fields)
                if self.has_forgotten(number):
                    self.metrics[number] = self.metrics_of(number)
                self.published[number], self.parents[number] = manifest, manifest.parent
            case "promote":
                if promoted is not None and promoted not in self.published:
                    del self.promoted[promoted]
                self.promoted.pop(number, None)
                self.promoted[number] = None
            case "record":
                metrics = dict(fields["metrics"])
                if not self.has_forgotten(number):
                    self.metrics[number] = {**self.metrics_of(number), **metrics}
            case "pin":
                self.pins.add(number)
            case "unpin":
                self.pins.discard(number)
            case "forget":
                self.parents.setdefault(number, None)
                self.published.pop(number, None)
                self.metrics.pop(number, None)
                if promoted != number:
                    self.promoted.pop(number, None)
            case "state":
                self.states.add(number)
            case "forget_state":
                self.states.discard(number)


def _parsed(line: bytes) -> tuple[str, int, dict[str, Any]]:
    match = _CHECKED.fullmatch(line)
    if match is None or zlib.crc32(match[1]) != int(match[2], 16):
        raise ValueError("its checksum is wrong or missing")
    fields = parse_json(line)
    if not is_number(fields["number"]):
        raise ValueError("it names no version")
    return fields["event"], fields["number"], fields


def as_metric(name: str, value: object, ranked: Set[str]) -> Any:
    """A metric as the journal holds it. Rewards, and what else is `ranked`, are numbers (text would be passed over by
    every rule that asks for the best), and rewards as large as float32 at most, as in training."""
    is_reward = name.rpartition("/")[2] == "reward"
    strict = is_reward or name in ranked
    if value is None or (isinstance(value, bool | str) and not strict):
        return value
    if isinstance(value, bool | str) or not isinstance(value, numbers.Real):
        other = "" if strict else ", text, a truth value"
        raise ConfigError(f"metric {name}={repr(value)[:60]} must be a number{other} or None (a tensor's is .item())")
    try:
        finite = float(value) if math.isfinite(value) else None
    except OverflowError:
        raise ConfigError(f"metric {name} is a whole number too large for a float") from None
    if is_reward and finite is not None and abs(finite) > LARGEST_REWARD:
        raise ConfigError(f"metric {name}={finite!r} is too large: float32 ends at {LARGEST_REWARD:.2g}")
    return int(value) if isinstance(value, numbers.Integral) else finite
