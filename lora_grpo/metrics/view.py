"""The live terminal view; on anything but a terminal, one plain line a step. All of it goes to stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live

from lora_grpo.metrics.quiet import own_stderr
from lora_grpo.metrics.render import ViewState, panel, plain_evaluation, plain_step, samples_table

PLAIN_WIDTH = 120


class LiveView:
    """Shows one run, or nothing. By default `stream` is a duplicate of stderr, which capturing stderr spares."""

    def __init__(self, run_dir: Path, total_steps: int, stream: TextIO | None = None, *, shown: bool = True) -> None:
        self.state = ViewState(run_dir, total_steps)
        self._stream = stream or own_stderr()
        self._owned = stream is None
        terminal = shown and self._stream.isatty()
        width = None if terminal else PLAIN_WIDTH
        self.console = Console(file=self._stream, soft_wrap=False, width=width, quiet=not shown)
        live = Live(get_renderable=lambda: panel(self.state), console=self.console, refresh_per_second=4)
        self._live = live if terminal else None

    def start(self, info: Mapping[str, Any], step: int = 0) -> None:
        self.state.step = step
        self.state.title = str(info.get("model", ""))
        if self._live:
            self._live.start()
        else:
            state = self.state
            self._say(f"{state.run_dir}: steps {step + 1} to {state.total_steps}  {state.title}".rstrip())

    def phase(self, name: str) -> None:
        self.state.phase = name

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.state.hear_step(step, metrics)
        if not self._live:
            self._say(plain_step(self.state))

    def evaluation(self, step: int, version: int | None, metrics: Mapping[str, Any]) -> None:
        self.state.evaluations.append((step, version, dict(metrics)))
        if not self._live:
            self._say(plain_evaluation(step, version, metrics))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.console.print(samples_table(step, rows))

    def message(self, text: str) -> None:
        self._say(text)

    def rollback(self, step: int, text: str) -> None:
        self.state.step = step
        self._say(text)

    def close(self) -> None:
        """Leaves the last state of the panel on the terminal; a second call does nothing."""
        if self._live:
            self._live.stop()
        if self._owned and not self._stream.closed:
            self._stream.close()

    def _say(self, line: str) -> None:
        # Plain text of any length stays one line: no markup, no wrapping.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
