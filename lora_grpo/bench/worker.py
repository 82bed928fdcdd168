"""A process with one strategy alive in it, told what to do request by request.

Our own errors are replies; any other ends the process, and its log, which the parent quotes, has the traceback.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from lora_grpo.bench import levels
from lora_grpo.bench.plan import Subject
from lora_grpo.bench.prepared import Bench, prepare
from lora_grpo.errors import LoraGrpoError


class Worker:
    """Answers requests: `{"work": "room:function", "with": {...}}`, preceded by a `{"prepare": subject}` if it needs a
    strategy. One that is alive is closed before the next one starts; where that leaves too much behind, none starts,
    and the answer is how many bytes are left."""

    def __init__(self) -> None:
        self._bench: Bench | None = None
        self._start_bytes: int | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        if "prepare" in request:
            return self._turn_to(request["prepare"])
        work = find_work(request["work"])
        return work(self._bench, **request["with"]) if self._bench else work(**request["with"])

    def close(self) -> None:
        if self._bench is not None:
            self._bench.strategy.close()
            self._bench = None

    def _turn_to(self, subject: Subject) -> int | None:
        from lora_grpo.engines import compat

        self.close()
        compat.import_vllm()
        if self._start_bytes is None:
            self._start_bytes = levels.taken(subject.device)
        elif (left := levels.left_behind(subject.device, self._start_bytes)) > levels.MAY_STAY_BYTES:
            return left
        self._bench = prepare(subject)
        return None


def find_work(name: str) -> Callable[..., Any]:
    """A function of a room here, or of a module of another package by its whole name."""
    room, _, function = name.partition(":")
    work: Callable[..., Any] = getattr(
        importlib.import_module(room if "." in room else f"{__package__}.{room}"), function
    )
    return work


def serve(requests: Connection, log: str) -> None:
    """Answer until None is asked, or nobody is left to ask; what vLLM and PEFT print goes to `log`."""
    # Ctrl-C reaches the parent alone, which keeps what was measured.
    os.setsid()
    with open(log, "ab") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    worker = Worker()
    with suppress(EOFError):
        while (request := requests.recv()) is not None:
            requests.send(_reply(worker, request))
    worker.close()


def _reply(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": worker.answer(request)}
    except LoraGrpoError as error:
        return {"error": str(error), "type": type(error).__name__}


def _die_with(parent: int) -> None:
    """A worker in the middle of a long piece of work does not outlive whoever asked for it."""
    while os.getppid() == parent:
        time.sleep(2.0)
    os._exit(1)
