"""An event loop on a thread of its own, so that synchronous callers can have many requests in flight."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import wait
from typing import Any, TypeVar

from lora_grpo.worker import working

_Result = TypeVar("_Result")

_LOOK_S = 0.2
"""Between two looks of a waiting worker, whether it is to stop."""


class Loop:
    """Runs coroutines for callers in any thread; what they share is only ever touched in the loop's."""

    def __init__(self, name: str) -> None:
        self._loop, self._ended = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._ended.wait())

    def run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """The coroutine's result. Ctrl-C in the caller cancels it, and with it the requests that are under way; so
        does the end of the job of a worker that waits here, whose `working` the coroutine sees."""
        worker, future = working(), asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while worker is not None and not wait([future], timeout=_LOOK_S).done:
                worker.look()
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
