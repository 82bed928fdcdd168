"""Keeps what libraries say out of the terminal, and in a file."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

LIBRARIES = ("vllm", "transformers", "huggingface_hub", "datasets", "peft", "accelerate", "torch", "py.warnings")

ENGINE_LOG = "engine.log"


@contextlib.contextmanager
def quiet_libraries(log_path: Path, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """While inside, the libraries' loggers and warnings write to `log_path`.

    A warning that this package or the user's own code gives goes to `tell`, as does what this package logs.
    """
    # vLLM sets its loggers up when it is imported, with a handler on stdout, unless this says not to.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    own, telling = logging.getLogger("lora_grpo"), None if tell is None else _Telling(tell)
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    if telling is not None:
        own.addHandler(telling)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown_by_origin(tell)
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


@contextlib.contextmanager
def capture_output(log_path: Path) -> Iterator[None]:
    """While inside, everything written to stdout and stderr goes to `log_path`, from Python, C and child processes.

    For the start of an engine, whose libraries write past every logger. A terminal opened before on a duplicate of
    the descriptor (`own_stderr`) still shows. An exception that leaves gets a note that names the file.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("a", encoding="utf-8", errors="backslashreplace") as log, contextlib.ExitStack() as stack:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            stack.enter_context(_redirected(descriptor, log.fileno()))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        try:
            yield
        except Exception as error:
            error.add_note(f"the output of the libraries is in {log_path}")
            raise
        finally:
            log.flush()


def own_stderr() -> TextIO:
    """A text stream on a duplicate of descriptor 2, which `capture_output` leaves alone."""
    return os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _redirected(descriptor: int, target: int) -> Iterator[None]:
    kept = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def _shown_by_origin(tell: Callable[[str], None] | None) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        foreign = "site-packages" in Path(filename).parts and "lora_grpo" not in Path(filename).parts
        if tell is not None and not foreign:
            tell(f"warning: {message}")
        else:
            logging.getLogger("py.warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    return show
