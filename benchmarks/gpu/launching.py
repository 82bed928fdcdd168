"""A step as a process in a session of its own: a fork of one that has imported vLLM once, or a fresh Python."""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeAlias

from steps import REPOSITORY

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lora_grpo.bench.imported"])
Process: TypeAlias = BaseProcess | subprocess.Popen[bytes]


def start(command: Sequence[str], log: Path, *, warm: bool) -> Process:
    """`warm` forks begin with all imports done; they are a script or a module (`-m`) of Python's."""
    with open(log, "w") as output:
        if warm:
            forked = FORKS.Process(target=become, args=(list(command), str(log)))
            # Imports may end the process that others are forked from; in a fresh one they will say why.
            with contextlib.suppress(EOFError, OSError):
                forked.start()
                return forked
        nothing = subprocess.DEVNULL
        return subprocess.Popen(
            command, cwd=REPOSITORY, stdin=nothing, stdout=output, stderr=output, start_new_session=True
        )


def wait(process: Process, timeout_s: float | None = None) -> int | None:
    """Its exit code; None if it still runs by then."""
    if isinstance(process, BaseProcess):
        process.join(timeout_s)
        return process.exitcode
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    return process.returncode


def send(process: Process, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signum)


def become(command: Sequence[str], log: str) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    with open(log, "a") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    # CUDA cannot be started where the process that this one was forked from has.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(command[0], command)
    _, *words = command
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
