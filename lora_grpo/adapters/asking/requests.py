"""What other processes ask of the one that holds a run: a file each, answered by a file beside it.

`NAME.json` is asked, and its client may take it back; `NAME.doing` is being done; `NAME.answer` is done. Each step is
one rename or unlink, so that client and holder never both believe that a request was theirs to end. No name is used
twice, and sorted they are in the order of asking.
"""

from __future__ import annotations

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
_FORGOTTEN_S = 86400.0
"""Long beyond any client that still looks, a stopped one included: without its answer it would ask again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what to do (`verb`, `args`), and the name under which it is answered."""

    name: str
    verb: str
    args: dict[str, Any] = field(default_factory=dict)


def request(run: str | Path, verb: str, **args: Any) -> Request:
    """Leave a request for the process that holds `run`; it looks before its next step.

    Raises `StoreError` when no process holds the run: open the store and do it yourself.
    """
    if holder(run) is None:
        raise StoreError(f"no process has {run} open; open the store yourself and make the change there")
    asked = Request(f"{time.time_ns():020d}-{secrets.token_hex(8)}", verb, args)
    path = _file(run, asked, _ASKED)
    with disk.reported(f"leaving a request in {path.parent}"):
        disk.make_private(path.parent)
        disk.replace_file(path, json.dumps({"verb": verb, "args": args}).encode(), sync=False)
    return asked


def answer_to(run: str | Path, request: Request) -> dict[str, Any] | None:
    """The holder's answer, taken away by reading it; None while there is none. See `is_gone`."""
    path = _file(run, request, _ANSWER)
    content = disk.read_small(path)
    if content is None:
        return None
    path.unlink(missing_ok=True)
    answer: dict[str, Any] = disk.parse_json(content)
    return answer


def withdraw(run: str | Path, request: Request) -> bool:
    """Take a request back, so that it is never done; False when it was begun, answered or withdrawn already."""
    try:
        _file(run, request, _ASKED).unlink()
    except FileNotFoundError:
        return False
    return True


def claim(run: Path, request: Request) -> bool:
    """Begin with a request: from here on it cannot be taken back. False when it was."""
    try:
        os.rename(_file(run, request, _ASKED), _file(run, request, _DOING))
    except FileNotFoundError:
        return False
    return True


def is_begun(run: str | Path, request: Request) -> bool:
    """Whether the holder is doing it, or ended while it did."""
    return _file(run, request, _DOING).exists() and not _file(run, request, _ANSWER).exists()


def is_gone(run: str | Path, request: Request) -> bool:
    """Whether nobody began with it, nor ever will: it was taken back, or the run was opened again since."""
    # In this order: one that goes on from one file to the next meanwhile is found there.
    return not any(_file(run, request, ending).exists() for ending in (_ASKED, _DOING, _ANSWER))


def cut_short(run: str | Path) -> str:
    """Why nobody knows what became of a request."""
    return (
        "the process that held the run ended while it was doing this; "
        f"`lora-grpo versions {run}` shows whether it was done"
    )


def sweep(run: Path) -> None:
    """Settle what was asked of a process that is gone: nobody else does it.

    Who asked is told of what was begun; what was not begun is gone. Answers that nobody came for are removed.
    """
    folder = run / "requests"
    for path in _files(folder, _DOING):
        if path.with_suffix(_ANSWER).exists():
            path.unlink()
        else:
            answer(run, Request(path.stem, ""), {"error": cut_short(run), "kind": StoreError.__name__})
    for path in _files(folder, _ASKED):
        path.unlink(missing_ok=True)
    for path in (*_files(folder, _ANSWER), *_files(folder, ".new")):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                path.unlink()


def pending(run: Path) -> list[Request]:
    """Requests that nobody began with, in order; a file that is none has the verb "unreadable", to be answered so."""
    read = ((path.stem, disk.read_small(path)) for path in _files(run / "requests", _ASKED))
    return [_parse(name, content) for name, content in read if content is not None]


def _parse(name: str, content: bytes) -> Request:
    try:
        values = disk.parse_json(content)
        return Request(name, str(values["verb"]), dict(values["args"]))
    except (ValueError, KeyError, TypeError) as error:
        return Request(name, "unreadable", {"error": str(error)})


def answer(run: Path, request: Request, result: dict[str, Any]) -> None:
    """Leave the answer, then take the request away: a kill in between leaves both, and the answer counts."""
    with disk.reported(f"answering request {request.name}"):
        disk.replace_file(_file(run, request, _ANSWER), json.dumps(result).encode(), sync=False)
        for ending in (_DOING, _ASKED):
            _file(run, request, ending).unlink(missing_ok=True)


def _file(run: str | Path, request: Request, ending: str) -> Path:
    return Path(run) / "requests" / f"{request.name}{ending}"


def _files(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{ending}") if path.is_file())
