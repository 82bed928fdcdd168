"""The large model, drawn on the GPU before the first engine starts there and written beside the steps that follow."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from places import FINISHED
from steps import HERE, REPOSITORY

DRAW_S = 60.0


class Drawing:
    """Runs `draw.py`; its process ends between two steps: an engine that starts must not see memory become free."""

    def __init__(self) -> None:
        self.started = False
        self._process: subprocess.Popen[str] | None = None
        self._drawn, self._written = threading.Event(), threading.Event()

    def start(self, shape: str, directory: Path, device: str, log: Path, environment: Mapping[str, str]) -> None:
        """Returns when the weights are in host memory, or it has failed, or `DRAW_S` later; at once if the model is
        there."""
        self.started = True
        if (directory / FINISHED).exists():
            return
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "draw.py"), shape, str(directory), device],
                cwd=REPOSITORY,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        if not self._drawn.wait(DRAW_S):
            self.end()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
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
            self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._process = None
