"""What other processes ask of the one that holds a run: a file each, numbered, answered by a file beside it.

`000001.json` is asked, and its client may take it back; `000001.doing` is being done; `000001.answer.json` is done.
Each step is one rename or unlink, so that client and holder never both believe that a request was theirs to end.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.locks import holder
from lora_grpo.errors import StoreError

_ANSWER = ".answer.json"
_DOING = ".doing"
_DROPPED = "dropped"
_UNCLAIMED_S = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what to do (`verb`, `args`), and the number under which it is answered."""

    number: int
    verb: str
    args: dict[str, Any] = field(default_factory=dict)


def request(run: str | Path, verb: str, **args: Any) -> Request:
    """Leave a request for the process that holds `run`; it looks before its next step.

    Raises `StoreError` when no process holds the run: open the store and do it yourself.
    """
    if holder(run) is None:
        raise StoreError(f"no process has {run} open; open the store there and do it directly")
    folder = Path(run) / "requests"
    with disk.reported(f"leaving a request in {folder}"):
        disk.make_private(folder)
        content = json.dumps({"verb": verb, "args": args}).encode()
        temporary = folder / f".{os.getpid()}.new"
        temporary.unlink(missing_ok=True)
        disk.write_file(temporary, [content], sync=False)
        number = _take_number(folder, temporary)
        temporary.unlink()
    return Request(number, verb, args)


def answer_to(run: str | Path, request: Request) -> dict[str, Any] | None:
    """The holder's answer, taken away by reading it; None while there is none. See `is_dropped`."""
    path = Path(run) / "requests" / f"{disk.folder_name(request.number)}{_ANSWER}"
    content = disk.read_small(path)
    if content is None:
        return None
    path.unlink(missing_ok=True)
    answer: dict[str, Any] = disk.parse_json(content)
    return answer


def withdraw(run: str | Path, request: Request) -> bool:
    """Take a request back, so that it is never done; False when it was begun, answered or withdrawn already."""
    try:
        (Path(run) / "requests" / f"{disk.folder_name(request.number)}.json").unlink()
    except FileNotFoundError:
        return False
    return True


def is_dropped(answer: dict[str, Any]) -> bool:
    """Whether an answer says that nobody began with the request, and nobody will: the run was opened again since."""
    return bool(answer.get(_DROPPED))


def claim(run: Path, request: Request) -> Request | None:
    """Begin with what is asked under a request's number: from here on it cannot be taken back. None when it was.

    What is done is what was claimed, not what was listed: the number of one that was taken back is given out again.
    """
    folder, name = run / "requests", disk.folder_name(request.number)
    doing = folder / f"{name}{_DOING}"
    try:
        os.rename(folder / f"{name}.json", doing)
    except FileNotFoundError:
        return None
    return _parse(request.number, disk.read_small(doing) or b"")


def is_begun(run: str | Path, request: Request) -> bool:
    """Whether the holder is doing it, or ended while it did."""
    return (Path(run) / "requests" / f"{disk.folder_name(request.number)}{_DOING}").exists()


def is_answered(run: str | Path, request: Request) -> bool:
    return (Path(run) / "requests" / f"{disk.folder_name(request.number)}{_ANSWER}").exists()


def cut_short(run: str | Path) -> str:
    """Why nobody knows what became of a request."""
    return (
        "the process that held the run ended while it was doing this; "
        f"`lora-grpo versions {run}` shows whether it was done"
    )


def sweep(run: Path) -> None:
    """Settle what was asked of a process that is gone: nobody else does it, and whoever still waits is told so.

    Answers that nobody came for in a minute are removed.
    """
    folder = run / "requests"
    endings: dict[int, set[str]] = {}
    for name in os.listdir(folder) if folder.is_dir() else ():
        number, _, ending = name.partition(".")
        if name.endswith(".new"):
            _remove_old(folder / name)
        if (asked := disk.number_in(number)) is not None:
            endings.setdefault(asked, set()).add(f".{ending}")
    for asked, found in endings.items():
        if found == {_ANSWER}:
            _remove_old(folder / f"{disk.folder_name(asked)}{_ANSWER}")
        elif _ANSWER in found:
            _clear(folder, asked)
        else:
            unfinished = {"error": cut_short(run), "kind": StoreError.__name__}
            answer(run, Request(asked, ""), unfinished if _DOING in found else {_DROPPED: True})


def _remove_old(path: Path) -> None:
    """Whoever waits for an answer looks many times a second, and a request is written in less: this one has nobody."""
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > _UNCLAIMED_S:
            path.unlink()


def pending(run: Path) -> list[Request]:
    """Requests not yet answered, in order; a file that is none has the verb "unreadable", to be answered as such."""
    read = ((number, disk.read_small(path)) for number, path in sorted(_files(run / "requests").items()))
    return [_parse(number, content) for number, content in read if content is not None]


def _parse(number: int, content: bytes) -> Request:
    try:
        values = disk.parse_json(content)
        return Request(number, str(values["verb"]), dict(values["args"]))
    except (ValueError, KeyError, TypeError) as error:
        return Request(number, "unreadable", {"error": str(error)})


def answer(run: Path, request: Request, result: dict[str, Any]) -> None:
    """Leave the answer, then take the request away: a kill in between leaves both, and the answer counts."""
    folder = run / "requests"
    name = disk.folder_name(request.number)
    with disk.reported(f"answering request {request.number}"):
        disk.replace_file(folder / f"{name}{_ANSWER}", json.dumps(result).encode(), sync=False)
        _clear(folder, request.number)


def _clear(folder: Path, number: int) -> None:
    for ending in (_DOING, ".json"):
        (folder / f"{disk.folder_name(number)}{ending}").unlink(missing_ok=True)


def _files(folder: Path) -> dict[int, Path]:
    paths = [path for path in folder.iterdir() if path.suffix == ".json"] if folder.is_dir() else ()
    return {number: path for path in paths if (number := disk.number_in(path.stem)) and path.is_file()}


def _take_number(folder: Path, written: Path) -> int:
    """Give the finished file the next free number; a link never replaces, so two processes cannot get the same."""
    number = max((disk.number_in(name.partition(".")[0]) or 0 for name in os.listdir(folder)), default=0) + 1
    while True:
        try:
            os.link(written, folder / f"{disk.folder_name(number)}.json")
        except FileExistsError:
            number += 1
        else:
            return number
