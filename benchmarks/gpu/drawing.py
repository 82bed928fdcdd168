"""The large model, drawn on the GPU before the first engine starts there and written beside the steps that follow."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from launching import Launcher, Started
from places import FINISHED
from steps import HERE

DRAW_S = 60.0


class Drawing:
    """Runs `draw.py`; its process ends between two steps: an engine that starts must not see memory become free."""

    def __init__(self, launcher: Launcher) -> None:
        self.started = False
        self._launcher = launcher
        self._process: Started | None = None
        self._drawn, self._written = threading.Event(), threading.Event()

    def start(self, shape: str, directory: Path, device: str, log: Path) -> None:
        """Returns when the weights are in host memory, or it has failed, or `DRAW_S` later; at once if the model is
        there."""
        self.started = True
        if (directory / FINISHED).exists():
            return
        stdin, self._stdin = os.pipe()
        told, stdout = os.pipe()
        command = [sys.executable, str(HERE / "draw.py"), shape, str(directory), device]
        with open(log, "w") as errors:
            self._process = self._launcher.start(command, warm=True, stdin=stdin, stdout=stdout, stderr=errors.fileno())
        os.close(stdin)
        os.close(stdout)
        threading.Thread(target=self._listen, args=(told,), daemon=True).start()
        if not self._drawn.wait(DRAW_S):
            self.end()

    def _listen(self, told: int) -> None:
        with open(told) as lines:
            for line in lines:
                self._drawn.set()
                if line.strip() == "written":
                    self._written.set()
        # It has failed, if it has not said so.
        self._drawn.set()
        self._written.set()

    def between_steps(self, wait_s: float = 0.0) -> None:
        """Let the process go if it has written everything; `wait_s` for that. Nothing else may use the GPU."""
        if self._process is not None and self._written.wait(wait_s):
            self.end()

    def end(self) -> None:
        """End it, whether it has written everything or not: an unfinished model is made again."""
        if self._process is None:
            return
        if not self._written.is_set():
            self._process.send(signal.SIGKILL)
        os.close(self._stdin)
        self._process.wait()
        self._process = None
