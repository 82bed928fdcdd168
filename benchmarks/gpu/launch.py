"""Starts steps out of a process that has imported vLLM once: `launch.py FD`, told over that socket what to start.

A step is a fork of this process: importing would cost each about ten seconds. One that is not `warm`, or could not use
CUDA as a fork, is a fresh Python.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import socket
import sys
import traceback
from collections.abc import Sequence

MESSAGE_BYTES = 1 << 16
USED = (
    "vllm.entrypoints.llm",
    "transformers.models.auto.modeling_auto",
    "lora_grpo.bench.suite",
    "lora_grpo.bench.strategies.native",
    "lora_grpo.bench.strategies.merge_fold",
)
"""What imports all else that a step with an engine needs."""


def main(socket_fd: int) -> None:
    """Until the other side is gone. What is started comes back from here, too, and ends as any Python does."""
    channel, imported = socket.socket(fileno=socket_fd), False
    while True:
        message, descriptors, *_ = socket.recv_fds(channel, MESSAGE_BYTES, 4)
        reap()
        if not message:
            return
        asked, before_s = json.loads(message), cpu_s(resource.getrusage(resource.RUSAGE_SELF))
        if asked["warm"] and not imported:
            imported = True
            import_all()
        imports_s = cpu_s(resource.getrusage(resource.RUSAGE_SELF)) - before_s
        if os.fork() == 0:
            channel.close()
            start(asked["command"], descriptors, asked["warm"], imports_s)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def import_all() -> None:
    """What steps import. Where that fails, the first of them says why."""
    from lora_grpo.bench import process
    from lora_grpo.engines import compat
    from lora_grpo.errors import LoraGrpoError

    try:
        compat.import_vllm()
        for name in USED:
            importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError, LoraGrpoError):
        traceback.print_exc()
    process.fork_workers = True
    # Nobody has to look through all that again for garbage.
    gc.freeze()


def reap() -> None:
    """Steps that have ended count among what this process has used."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start(command: Sequence[str], descriptors: Sequence[int], warm: bool, imports_s: float) -> None:
    """Start it in a session of its own, say its id, wait for it, and say what came of it. Returns in the new process,
    when it is done."""
    *standard, answers = descriptors
    process = os.fork()
    if process == 0:
        os.setsid()
        say(answers, pid=os.getpid())
        become(command, standard, answers, warm)
        return
    _, status, used = os.wait4(process, 0)
    say(answers, rc=os.waitstatus_to_exitcode(status), cpu_s=cpu_s(used) + imports_s)
    os._exit(0)


def become(command: Sequence[str], standard: Sequence[int], answers: int, warm: bool) -> None:
    for target, descriptor in enumerate(standard):
        os.dup2(descriptor, target)
    for descriptor in (*standard, answers):
        os.close(descriptor)
    if not warm or not fork_is_whole():
        os.execv(command[0], command)
    _, *words = command
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def fork_is_whole() -> bool:
    """Whether CUDA can be started in this process: not where the one that it was forked from has."""
    torch = sys.modules.get("torch")
    return torch is None or not torch.cuda._is_in_bad_fork()


def say(descriptor: int, **answer: float) -> None:
    os.write(descriptor, json.dumps(answer).encode() + b"\n")


def cpu_s(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(int(sys.argv[1]))
