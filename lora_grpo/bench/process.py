"""The parent's side of a worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import IO, Any

from lora_grpo import errors
from lora_grpo.bench.plan import Subject
from lora_grpo.bench.worker import serve
from lora_grpo.errors import EngineError

_GRACE_S = 20.0


fork_workers = False
"""Set by a program that has imported all that a worker needs and has done nothing with it: no thread, no CUDA."""


class WorkerProcess:
    """A worker in a process of its own; what it prints goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        read_fd, write_fd = os.pipe()
        with open(log, "ab") as output:
            self._process = _Fork(write_fd, output.fileno()) if fork_workers else _fresh_python(write_fd, output)
        os.close(write_fd)
        self._replies = os.fdopen(read_fd)

    def prepare(self, subject: Subject) -> None:
        """Have it load trainer and engine; `finish` waits for it."""
        self.ask({"prepare": subject.fields()})

    def do(self, work: str, **arguments: Any) -> Any:
        """Have a piece of work done; returns its result. Raises `EngineError` when it failed."""
        self.ask({"work": work, "with": arguments})
        return self.finish()

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(self._obituary()) from None

    def finish(self) -> Any:
        """The result of what was asked last."""
        line = self._replies.readline()
        if not line:
            raise EngineError(self._obituary())
        reply = json.loads(line)
        if "error" in reply:
            raise getattr(errors, reply["type"])(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """Let it close its engine and end; kill it when it takes long."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._replies.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _obituary(self) -> str:
        code = self._process.wait()
        with open(self._log, errors="replace") as log:
            last = " | ".join(line.strip() for line in deque(log, maxlen=3))
        return f"a worker died with exit code {code}; its log ({self._log}) ends: {last}"


def _fresh_python(reply_fd: int, output: IO[bytes]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lora_grpo.bench.worker", str(reply_fd)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=(reply_fd,),
        # Ctrl-C reaches the parent alone, which keeps what was measured.
        start_new_session=True,
        text=True,
    )


class _Fork:
    """As much of `subprocess.Popen` as is needed of a worker."""

    def __init__(self, reply_fd: int, output_fd: int) -> None:
        read_fd, write_fd = os.pipe()
        descriptors = (read_fd, write_fd, reply_fd, output_fd)
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=descriptors)
        self._process.start()
        os.close(read_fd)
        self.stdin = os.fdopen(write_fd, "w")

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a worker", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _work(read_fd: int, write_fd: int, reply_fd: int, output_fd: int) -> None:
    os.setsid()
    # Requests end when nobody can write any more.
    os.close(write_fd)
    for descriptor in (1, 2):
        os.dup2(output_fd, descriptor)
    with os.fdopen(read_fd) as requests:
        serve(requests, reply_fd)
