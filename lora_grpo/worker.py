"""A thread that does one job at a time, short calls in between, and shows signs of life."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lora_grpo.errors import EngineError, LoraGrpoError

T = TypeVar("T")

working: "ContextVar[Worker | None]" = ContextVar("working", default=None)
"""The worker whose job this is asked in: in its thread, or in a task that the job has begun elsewhere."""


class Stopped(EngineError):
    """A job was stopped because nobody wants its result any more."""


@dataclass
class Job(Generic[T]):
    function: Callable[[], T]
    result: Future[T] = field(default_factory=Future)
    stopping: bool = False

    def stop(self) -> None:
        self.stopping = True
        self.result.cancel()

    def run(self) -> None:
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            self.result.set_result(self.function())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
            self.result.set_exception(error)


class Worker:
    """Runs jobs in the order of `submit`, in a thread of its own that ends with the process. A job that calls `poll`
    lets others `call` in between, and can be stopped there."""

    def __init__(self, name: str, *, patience_s: float, failure: type[LoraGrpoError] = EngineError) -> None:
        """`wait` and `call` raise `failure` with the name when there was no sign of life for `patience_s`."""
        self.name, self._patience_s, self._failure = name, patience_s, failure
        self._jobs, self._calls = deque[Job[Any]](), deque[Job[Any]]()
        self._current: Job[Any] | None = None
        self._wake, self._ended = threading.Condition(), False
        self._sign_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"lora_grpo-{name}", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Job[T]:
        return self._enter(self._jobs, function)

    def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, run in the thread before any waiting job, within a running one if it polls."""
        if threading.current_thread() is self._thread:
            return function()
        return self.wait(self._enter(self._calls, function))

    def wait(self, job: Job[T]) -> T:
        while True:
            try:
                return job.result.result(timeout=max(0.0, self._left_s()))
            except TimeoutError:
                if job.result.done():
                    return job.result.result()
                if self.hangs:
                    said = f"the {self.name} has shown no progress for {self._patience_s:g} s (stall_timeout_s)"
                    raise self._failure(f"{said}, so the run stops waiting for it; HEAD is unchanged") from None

    def poll(self) -> None:
        """For a job, wherever it can be interrupted: run the calls that came. Raises `Stopped` when it is to end."""
        self.lives()
        self.look()
        while self._calls:
            self._calls.popleft().run()
            self.lives()

    def lives(self) -> None:
        """A sign of life, from any thread: a part of what the job waits for is there."""
        self._sign_s = time.monotonic()

    def look(self) -> None:
        """For a job that waits for others, who may hang: raises `Stopped` when it is to end, and is no sign of life."""
        if self._current is not None and self._current.stopping:
            raise Stopped(f"the {self.name} was told to stop")

    @property
    def hangs(self) -> bool:
        """Whether it was at work, or should have been, without a sign of life for longer than its patience."""
        return (self._current is not None or bool(self._jobs or self._calls)) and self._left_s() <= 0

    def end(self) -> None:
        with self._wake:
            self._ended = True
            for job in [*self._jobs, *([self._current] if self._current else [])]:
                job.stop()
            self._wake.notify()

    def join(self) -> bool:
        """Wait for the thread to `end`; False when it hangs and is left behind."""
        while self._thread.is_alive() and not self.hangs:
            self._thread.join(timeout=min(1.0, max(0.01, self._left_s())))
        return not self._thread.is_alive()

    def _left_s(self) -> float:
        return self._sign_s + self._patience_s - time.monotonic()

    def _enter(self, queue: deque[Job[Any]], function: Callable[[], T]) -> Job[T]:
        job = Job(function)
        with self._wake:
            if self._ended:
                raise EngineError(f"the {self.name} has ended")
            if self._current is None and not (self._jobs or self._calls):
                self._sign_s = time.monotonic()
            queue.append(job)
            self._wake.notify()
        return job

    def _work(self) -> None:
        working.set(self)
        while True:
            with self._wake:
                self._current = None
                self._wake.wait_for(lambda: self._jobs or self._calls or self._ended)
                if not (self._jobs or self._calls):
                    return
                self._current = self._calls.popleft() if self._calls else self._jobs.popleft()
                self._sign_s = time.monotonic()
            self._current.run()
