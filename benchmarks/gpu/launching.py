"""Processes that `launch.py` starts, seen from the script."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from steps import HERE, REPOSITORY

CLOSE_S = 5.0


class Started:
    """A process in a session of its own. `returncode` is None while it runs; `cpu_s` are the processor seconds of it
    and of all that it has waited for, with those of the imports if it was the first to need them."""

    def __init__(self, answers: int, launcher: Launcher) -> None:
        self.returncode: int | None = None
        self.cpu_s = 0.0
        self._pid: int | None = None
        self._answers, self._launcher, self._unread = answers, launcher, b""

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code, 1 if the launcher died with it. Raises `subprocess.TimeoutExpired`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.returncode is None:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], left_s)[0]:
                raise subprocess.TimeoutExpired("a step", timeout_s or 0.0)
            self._read()
        return self.returncode

    def send(self, signum: int) -> None:
        """To it and all of its session; where it has not begun yet, the launcher ends in its place."""
        while self.returncode is None and select.select([self._answers], [], [], 0.0)[0]:
            self._read()
        if self._pid is None:
            self._launcher.kill()
        elif self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signum)

    def _read(self) -> None:
        found = os.read(self._answers, 4096)
        *lines, self._unread = (self._unread + found).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._pid, self.cpu_s = answer.get("pid", self._pid), answer.get("cpu_s", 0.0)
            self.returncode = answer.get("rc")
        if not found and self.returncode is None:
            self.returncode = 1
        if self.returncode is not None:
            os.close(self._answers)


class Launcher:
    """Starts processes, all with one environment."""

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        self.forks = True
        """Whether what is `warm` may be a fork."""
        self._environ, self._log = dict(environ), log
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, command: Sequence[str], *, warm: bool, stdout: int, stderr: int | None = None, stdin: int | None = None
    ) -> Started:
        """`warm` forks begin with all imports done; they are a script or a module (`-m`) of Python's."""
        if self._process is None or self._process.poll() is not None:
            self._open()
        read, answers = os.pipe()
        asked = {"command": list(command), "warm": warm and self.forks}
        with open(os.devnull) as nothing:
            standard = [nothing.fileno() if stdin is None else stdin, stdout, stdout if stderr is None else stderr]
            socket.send_fds(self._channel, [json.dumps(asked).encode()], [*standard, answers])
        os.close(answers)
        return Started(read, self)

    def _open(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with open(self._log, "ab") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "launch.py"), str(theirs.fileno())],
                cwd=REPOSITORY,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """What it has started goes on."""
        if self._process is not None:
            self._channel.close()
            try:
                self._process.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
