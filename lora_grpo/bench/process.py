"""The parent's side of a worker."""

from __future__ import annotations

import multiprocessing
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_grpo import errors
from lora_grpo.bench.plan import Subject
from lora_grpo.bench.worker import serve
from lora_grpo.errors import EngineError

_GRACE_S = 20.0
START_BY = "spawn"
"""`fork` where a program has imported all that a worker needs and has done nothing with it: no thread, no CUDA."""


class WorkerProcess:
    """A worker in a process of its own; what it prints goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._channel, theirs = multiprocessing.Pipe()
        process: Any = multiprocessing.get_context(START_BY).Process  # type: ignore[attr-defined]
        self._process = process(target=serve, args=(theirs, str(log)))
        self._process.start()
        theirs.close()

    def prepare(self, subject: Subject) -> int | None:
        """Have it load trainer and engine; see `Worker`."""
        left: int | None = self._ask({"prepare": subject})
        return left

    def do(self, work: str, **arguments: Any) -> Any:
        """Have a piece of work done; returns its result. Raises `EngineError` when it failed."""
        return self._ask({"work": work, "with": arguments})

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            self._channel.send(request)
            reply = self._channel.recv()
        except (EOFError, OSError):
            raise EngineError(self._obituary()) from None
        if "error" in reply:
            raise getattr(errors, reply["type"])(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """Let it close its engine and end; kill it when it takes long."""
        with suppress(OSError):
            self._channel.send(None)
        self._process.join(_GRACE_S)
        self.kill()
        self._channel.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _obituary(self) -> str:
        self._process.join()
        with open(self._log, errors="replace") as log:
            last = " | ".join(line.strip() for line in deque(log, maxlen=3))
        return f"a worker died with exit code {self._process.exitcode}; its log ({self._log}) ends: {last}"
