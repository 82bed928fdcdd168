"""One background thread that writes to the archive, so that a step does not wait for a disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lora_grpo.errors import StoreCorrupt, StoreError


@dataclass(frozen=True, slots=True)
class Job:
    """One folder to write. `held_bytes` is the memory that stays taken until it is written (0: it reads from tmpfs)."""

    kind: str
    number: int
    size_bytes: int
    held_bytes: int
    run: Callable[[], None]


class BackgroundWriter:
    """Runs jobs in order, one at a time.

    A job that fails stays first in the queue: its error is raised by the next call on the store, and only then is the
    job tried again. Nothing is dropped but a job whose source is damaged (`StoreCorrupt`), which no retry can mend.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._failure: StoreError | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def backlog_bytes(self) -> int:
        """Bytes not yet durable."""
        with self._changed:
            return sum(job.size_bytes for job in self._jobs)

    def pending(self, kind: str) -> set[int]:
        with self._changed:
            return {job.number for job in self._jobs if job.kind == kind}

    def has_room(self, held_bytes: int) -> bool:
        """Whether a job that holds so much memory would be taken at once."""
        with self._changed:
            held = sum(job.held_bytes for job in self._jobs)
            return held_bytes == 0 or held == 0 or held + held_bytes <= self._limit_bytes

    def submit(self, job: Job) -> None:
        """Queue a job; waits while the memory held by the queue is above the limit.

        What failed meanwhile is raised by the next call on the store, since this one was done. Only where the disk
        takes nothing and the queue is full is it raised here, and the job is not queued.
        """
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="lora-grpo-archive", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._failure is not None or self.has_room(job.held_bytes))
            if not self.has_room(job.held_bytes):
                self.raise_failure()
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, kind: str, number: int) -> bool:
        """Take jobs out of the queue; False when one of them is being written right now."""
        with self._changed:
            running = self._running
            if running is not None and (running.kind, running.number) == (kind, number):
                return False
            self._jobs = deque(job for job in self._jobs if (job.kind, job.number) != (kind, number))
            self._changed.notify_all()
            return True

    def wait_for(self, kind: str, number: int) -> None:
        self._wait(lambda: all((job.kind, job.number) != (kind, number) for job in self._jobs))

    def flush(self) -> None:
        """Return when everything is durable; raises what failed."""
        self._wait(lambda: not self._jobs)

    def raise_failure(self) -> None:
        """Raise the error of the last failed job, once, and let the thread go on."""
        with self._changed:
            failure, self._failure = self._failure, None
            if failure is not None:
                self._changed.notify_all()
                raise failure

    def close(self) -> None:
        """Write what is queued and end the thread."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self.raise_failure()
            self._changed.wait_for(lambda: self._failure is not None or done())
            self.raise_failure()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (bool(self._jobs) and self._failure is None))
                if self._closing:
                    return
                self._running = job = self._jobs[0]
            failure: StoreError | None = None
            try:
                job.run()
            except StoreError as error:
                failure = error
            except Exception as bug:  # noqa: BLE001 - whatever it is, the next call raises it
                failure = StoreError(f"the archive thread failed: {type(bug).__name__}: {bug}")
                failure.__cause__ = bug
            with self._changed:
                self._running, self._failure = None, failure
                if failure is None or isinstance(failure, StoreCorrupt):
                    self._jobs.popleft()
                self._changed.notify_all()
