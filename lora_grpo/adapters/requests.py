"""What other processes ask of the one that holds a run: a file each, numbered, answered by a file beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_grpo.adapters import disk
from lora_grpo.adapters.locks import holder
from lora_grpo.errors import StoreError

_ANSWER = ".answer.json"


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
    """The holder's answer, taken away by reading it; None while there is none."""
    path = Path(run) / "requests" / f"{disk.folder_name(request.number)}{_ANSWER}"
    content = disk.read_small(path)
    if content is None:
        return None
    path.unlink()
    answer: dict[str, Any] = json.loads(content)
    return answer


def withdraw(run: str | Path, request: Request) -> bool:
    """Take a request back; False when it is gone already, answered or withdrawn."""
    try:
        (Path(run) / "requests" / f"{disk.folder_name(request.number)}.json").unlink()
    except FileNotFoundError:
        return False
    return True


def pending(run: Path) -> list[Request]:
    """Requests not yet answered, in order; a file that is none has the verb "unreadable", to be answered as such."""
    read = ((number, disk.read_small(path)) for number, path in sorted(_files(run / "requests").items()))
    return [_parse(number, content) for number, content in read if content is not None]


def _parse(number: int, content: bytes) -> Request:
    try:
        values = json.loads(content)
        return Request(number, str(values["verb"]), dict(values["args"]))
    except (ValueError, KeyError, TypeError) as error:
        return Request(number, "unreadable", {"error": str(error)})


def answer(run: Path, request: Request, result: dict[str, Any]) -> None:
    """Leave the answer, then take the request away: a kill in between has it answered twice, never lost."""
    folder = run / "requests"
    name = disk.folder_name(request.number)
    with disk.reported(f"answering request {request.number}"):
        disk.replace_file(folder / f"{name}{_ANSWER}", json.dumps(result).encode(), sync=False)
        (folder / f"{name}.json").unlink(missing_ok=True)


def _files(folder: Path) -> dict[int, Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(path.stem): path for path in paths if path.suffix == ".json" and path.stem.isdigit()}


def _take_number(folder: Path, written: Path) -> int:
    """Give the finished file the next free number; a link never replaces, so two processes cannot get the same."""
    taken = [int(stem) for name in os.listdir(folder) if (stem := name.partition(".")[0]).isdigit()]
    number = max(taken, default=0) + 1
    while True:
        try:
            os.link(written, folder / f"{disk.folder_name(number)}.json")
        except FileExistsError:
            number += 1
        else:
            return number
