"""What other processes ask of the one that holds a run: a file each, answered by a file beside it.

`NAME.json` is asked, and its client may take it back; `NAME.doing` is being done; `NAME.answer` is done. Each step is
one rename or unlink, so that client and holder never both believe that a request was theirs to end. No name is used
twice, and sorted they are in the order of asking."""

import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.locks import holder
from lora_grpo.errors import StoreError

_ASKED, _DOING, _ANSWER = ".json", ".doing", ".answer"
_FORGOTTEN_S = 86400.0  # beyond any client that still looks: without its answer it would ask again


@dataclass(frozen=True, slots=True)
class Request:
    run: Path
    name: str
    verb: str
    args: dict[str, Any] = field(default_factory=dict)

    def answered(self) -> dict[str, Any] | None:
        """The holder's answer, taken away by reading it; None while there is none."""
        path = self._file(_ANSWER)
        if (content := disk.read_small(path)) is None:
            return None
        path.unlink(missing_ok=True)
        return dict(disk.parse_json(content))

    def withdraw(self) -> bool:
        """Take it back, so that it is never done; False when it was begun, answered or withdrawn already."""
        with suppress(FileNotFoundError):
            self._file(_ASKED).unlink()
            return True
        return False

    def is_begun(self) -> bool:
        """Whether the holder is doing it, or ended while it did."""
        return self._file(_DOING).exists() and not self._file(_ANSWER).exists()

    def is_gone(self) -> bool:
        """Whether nobody began with it, nor ever will: it was taken back, or the run was opened again since."""
        # In this order: one that goes on from one file to the next meanwhile is found there.
        return not any(self._file(ending).exists() for ending in (_ASKED, _DOING, _ANSWER))

    @property
    def cut_short(self) -> str:
        ended = "the process that held the run ended while it was doing this"
        return f"{ended}; `lora-grpo versions {self.run}` shows whether it was done"

    def claim(self) -> bool:
        """Begin with it: from here on it cannot be taken back. False when it was."""
        with disk.reported(f"beginning with request {self.name}"), suppress(FileNotFoundError):
            os.rename(self._file(_ASKED), self._file(_DOING))
            return True
        return False

    def answer(self, result: dict[str, Any]) -> None:
        """Leave the answer, then take the request away: a kill in between leaves both, and the answer counts."""
        with disk.reported(f"answering request {self.name}"):
            disk.replace_file(self._file(_ANSWER), json.dumps(result).encode(), sync=False)
            for ending in (_DOING, _ASKED):
                self._file(ending).unlink(missing_ok=True)

    def _file(self, ending: str) -> Path:
        return self.run / "requests" / f"{self.name}{ending}"


def request(run: str | Path, verb: str, **args: Any) -> Request:
    """Ask the process that holds `run`, which looks before its next step; `StoreError` when none holds it."""
    if holder(run) is None:
        raise StoreError(f"no process has {run} open; open the store yourself and make the change there")
    asked = Request(Path(run), f"{time.time_ns():020d}-{secrets.token_hex(8)}", verb, args)
    path = asked._file(_ASKED)
    with disk.reported(f"leaving a request in {path.parent}"):
        disk.make_private(path.parent)
        disk.replace_file(path, json.dumps({"verb": verb, "args": args}).encode(), sync=False)
    return asked


def sweep(run: Path) -> None:
    """Settle what was asked of a process that is gone: of what was begun, who asked is told; the rest is removed."""
    for path in _files(run, _DOING):
        if not path.with_suffix(_ANSWER).exists():
            begun = Request(run, path.stem, "")
            begun.answer({"error": begun.cut_short, "kind": StoreError.__name__})
        path.unlink(missing_ok=True)
    for path in _files(run, _ASKED):
        path.unlink(missing_ok=True)
    for path in (*_files(run, _ANSWER), *_files(run, ".new")):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                path.unlink()


def pending(run: Path | None) -> list[Request]:
    """Requests that nobody began with, in order; a file that is none has the verb "unreadable", to be answered so."""
    found = []
    for path in () if run is None else _files(run, _ASKED):
        if (content := disk.read_small(path)) is None:
            continue
        try:
            values = disk.parse_json(content)
            verb, args = str(values["verb"]), dict(values["args"])
        except (ValueError, KeyError, TypeError) as error:
            verb, args = "unreadable", {"error": str(error)}
        found.append(Request(path.parent.parent, path.stem, verb, args))
    return found


def _files(run: Path, ending: str) -> list[Path]:
    return sorted(path for path in (run / "requests").glob(f"*{ending}") if path.is_file())
