"""One object that a trainer tells what happened, and that tells the log, the terminal and accelerate's trackers."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from lora_grpo.errors import ConfigError
from lora_grpo.metrics.curves import PLOT_FILE
from lora_grpo.metrics.log import ENGINE_LOG, METRICS_FILE, RunLog, capture_output, own_stderr, quiet_libraries
from lora_grpo.metrics.render import ViewState, panel, plain_evaluation, plain_start, plain_step, table
from lora_grpo.sections import nearest_key

SAMPLES_FILE = "samples.jsonl"


class Reporter(ExitStack):
    """Until it is closed the libraries' loggers and warnings go to `RUN/engine.log`, unless the caller sees to that
    himself (`quiet=False`). Build it on the main process only, in a `with` block, or close it: an open live view owns
    the terminal, as a duplicate of stderr, which capturing stderr spares."""

    def __init__(
        self, run_dir: Path, total_steps: int, *, view: bool = True, trackers: Sequence[str] = (), quiet: bool = True
    ) -> None:
        super().__init__()
        self.run_dir, self.seconds = run_dir, dict[str, float]()
        check_trackers(trackers)
        check_folder(self.run_dir)
        if not self.run_dir.exists():
            self.callback(self._leave_nothing)
        self._log, self._samples = RunLog(self.run_dir / METRICS_FILE), RunLog(self.run_dir / SAMPLES_FILE)
        for log in (self._log, self._samples):
            self.callback(log.close)
        self._state = ViewState(self.run_dir, total_steps)
        stream = self.enter_context(own_stderr())
        terminal = view and stream.isatty()
        self._console = Console(file=stream, width=None if terminal else 120, quiet=not view)
        self._live = Live(get_renderable=lambda: panel(self._state), console=self._console) if terminal else None
        self._tracker_names = trackers
        self._trackers: list[Any] = []
        if quiet:
            self.enter_context(quiet_libraries(self.run_dir / ENGINE_LOG, self.message))

    def start(self, info: Mapping[str, Any], step: int = 0) -> None:
        """The run begins, or goes on after `step`. `info` is what it runs with; `info["model"]` is shown."""
        self._log.append("start", step=step, info=info)
        if self._tracker_names:
            self._start_trackers(info)
        self._state.step, self._state.title = step, str(info.get("model", ""))
        if self._live:
            self.enter_context(self._live)
        else:
            self._say(plain_start(self._state))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what a step does: generate, reward, train or publish. Shown from then on; `seconds` has how long."""
        self._state.phase = name
        started = time.perf_counter()
        yield
        self.seconds[f"time/{name}_s"] = time.perf_counter() - started

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._log.append("step", **{**metrics, "step": step})
        self._track(step, metrics)
        self._state.hear_step(step, metrics)
        if not self._live:
            self._say(plain_step(self._state))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._samples.append("samples", step=step, rows=rows)
        self._console.print(table(rows, f"samples of step {step}", long=("prompt", "completion")))

    def evaluation(self, step: int, version: int | None, metrics: Mapping[str, Any]) -> None:
        """Held-out metrics of `version` (None: the base model), measured after `step` (0: before the first)."""
        self._log.append("evaluation", **{**metrics, "step": step, "version": version})
        self._track(step, {f"eval/{name}": value for name, value in metrics.items()})
        self._state.held_out.append((version, metrics["reward"]))
        if not self._live:
            self._say(plain_evaluation(step, version, metrics))

    def message(self, text: str) -> None:
        self._log.append("message", text=text)
        self._say(text)

    def rollback(self, step: int, text: str) -> None:
        self._log.append("rollback", step=step, text=text)
        self._state.step = step
        self._say(text)

    def capture(self) -> AbstractContextManager[None]:
        return capture_output(self.run_dir / ENGINE_LOG)

    def end(self, result: Mapping[str, Any]) -> None:
        self._log.append("end", info=result)

    def _say(self, line: str) -> None:
        # Plain text of any length stays one line: no markup, no wrapping.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _leave_nothing(self) -> None:
        with suppress(OSError):
            self.run_dir.rmdir()

    def _start_trackers(self, info: Mapping[str, Any]) -> None:
        """Each that has started is finished at the end, should the next one fail."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers ask it whether this is the main process
        settings = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in flat(info)}
        for name in dict.fromkeys(self._tracker_names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            where = {"logging_dir": str(self.run_dir)} if kind.requires_logging_directory else {}
            tracker = kind(name if where else self.run_dir.name, **where)
            tracker.start()
            self._trackers.append(tracker)
            self.callback(tracker.finish)
            tracker.store_init_configuration(settings)

    def _track(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)


def check_folder(run_dir: Path) -> None:
    """Raises `ConfigError` where a run directory cannot be written, or something else stands in the way of its logs."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"the run directory {run_dir} cannot be created: {there} is a file; choose another directory")
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ConfigError(f"{run_dir}: {there} is not writable ({error.strerror}); choose another directory") from error
    for path in (run_dir / name for name in (METRICS_FILE, SAMPLES_FILE, ENGINE_LOG, PLOT_FILE)):
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(f"{path} should be a regular file but is not; remove it")


def check_trackers(names: Sequence[str]) -> str:
    """The names again. Raises `ConfigError` for an unknown one, or one that is not installed."""
    if not names:
        return "none"
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"report_to: unknown tracker {name!r}; {nearest_key(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise ConfigError(f"report_to: {name!r} is not installed; pip install {name}, or leave it out")
    return ", ".join(names)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
