"""A process with one strategy alive in it, told what to do line by line: `python -m lora_grpo.bench.worker REPLY_FD`.

Requests are JSON lines on stdin, replies JSON lines on a descriptor of their own: vLLM and PEFT print to stdout.
Our own errors are replies; any other ends the process, and its log, which the parent quotes, has the traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from lora_grpo.bench import levels
from lora_grpo.bench.plan import Subject
from lora_grpo.bench.prepared import Bench, prepare
from lora_grpo.errors import LoraGrpoError


class Worker:
    """Answers requests: `{"work": "room:function", "with": {...}}`, preceded by a `{"prepare": {...}}` if it needs a
    strategy. One that is alive is closed before the next one starts; where that leaves too much behind, none starts,
    and the answer is how many bytes are left."""

    def __init__(self) -> None:
        self._bench: Bench | None = None
        self._start_bytes: int | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        if "prepare" in request:
            return self._turn_to(Subject(**request["prepare"]))
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
    room, _, function = name.partition(":")
    work: Callable[..., Any] = getattr(importlib.import_module(f"lora_grpo.bench.{room}"), function)
    return work


def serve(requests: Iterable[str], reply_fd: int) -> None:
    """Answer until there are no more requests."""
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    worker = Worker()
    with os.fdopen(reply_fd, "w") as replies:
        for line in requests:
            print(json.dumps(_reply(worker, json.loads(line))), file=replies, flush=True)
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


if __name__ == "__main__":
    sys.path.append(os.getcwd())
    serve(sys.stdin, int(sys.argv[1]))
