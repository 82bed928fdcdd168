"""A process with one strategy alive in it, told what to do request by request: the parent's side and its own.

Our own errors are replies; any other ends the process, and its log, which the parent quotes, has the traceback.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lora_grpo.bench.strategies import load
from lora_grpo.errors import EngineError, LoraGrpoError
from lora_grpo.metrics.quiet import capture_output

_GRACE_S = 20.0
_IMPORTED = f"{__package__}.imported"
"""Where it is imported, all that a worker needs is, and nothing has been done with it: no thread, no CUDA."""
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""


class WorkerProcess:
    """A worker in a process of its own; what it prints goes to `log`.

    `alone`: it imports by itself, what it needs and when, and shares no memory with others: for one whose memory is
    measured, and for CUDA, which a fork cannot start where importing has.
    """

    def __init__(self, log: Path, *, alone: bool = False) -> None:
        self._log = log
        self._channel, theirs = multiprocessing.Pipe()
        self._process = _context(log, alone).Process(target=serve, args=(theirs, str(log)))
        try:
            self._process.start()
        except (EOFError, OSError):
            raise EngineError(f"no worker could be started; {self._last_words()}") from None
        theirs.close()

    def do(self, work: Callable[..., Any], **arguments: Any) -> Any:
        """Have a function of a module called; returns its result. Raises `EngineError` when it failed.

        A strategy stays there: all later work is given it first.
        """
        try:
            self._channel.send((work, arguments))
            reply = self._channel.recv()
        except (EOFError, OSError):
            self._process.join()
            died = f"a worker died with exit code {self._process.exitcode}"
            raise EngineError(f"{died}; {self._last_words()}") from None
        if isinstance(reply, LoraGrpoError):
            raise reply
        return reply

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

    def _last_words(self) -> str:
        with open(self._log, errors="replace") as log:
            last = " | ".join(line.strip() for line in deque(log, maxlen=3))
        return f"its log ({self._log}) ends: {last}"


def _context(log: Path, alone: bool) -> Any:
    """Where workers come from: importing takes as long as loading a small model, so it is done once for all."""
    if _IMPORTED in sys.modules:
        return multiprocessing.get_context("fork")
    if alone:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_IMPORTED])
    with capture_output(log):
        forkserver.ensure_running()
    return context


def serve(requests: Connection, log: str) -> None:
    """The worker: answer until None is asked, or nobody is left to ask; what vLLM and PEFT print goes to `log`."""
    # Ctrl-C reaches the parent alone, which keeps what was measured.
    os.setsid()
    with open(log, "ab") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    # In the middle of a long piece of work, too, it does not outlive whoever asked for it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    loaded: list[Any] = []
    with suppress(EOFError):
        while (request := requests.recv()) is not None:
            work, arguments = request
            try:
                result = work(*loaded, **arguments)
                if work is load:
                    loaded, result = [result], None
                requests.send(result)
            except LoraGrpoError as error:
                requests.send(error)
    for strategy in loaded:
        strategy.close()
