"""An event loop on a thread of its own, so that synchronous callers can have many requests in flight."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from contextvars import ContextVar
from typing import Any, TypeVar

from lora_grpo.worker import Worker, working

_Result = TypeVar("_Result")

_LOOK_S = 0.2
"""Between two looks of a waiting worker: whether anything arrived, and whether it is to stop."""


class _Signs:
    """How much of what a caller waits for has arrived."""

    def __init__(self) -> None:
        self.count = 0


_signs: ContextVar[_Signs] = ContextVar("signs")


def arrived() -> None:
    """To be called in the loop when a part of what was asked for is there: a sign of life to the one that waits."""
    signs = _signs.get(None)
    if signs is not None:
        signs.count += 1


class Loop:
    """Runs coroutines for callers in any thread; what they share is only ever touched in the loop's."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """The coroutine's result. Ctrl-C in the caller cancels it, and with it the requests that are under way; so
        does the end of the job of a worker that waits here, to which every `arrived` is a sign of life."""
        signs, worker = _Signs(), working()
        future = asyncio.run_coroutine_threadsafe(_signalling(coroutine, signs), self._loop)
        try:
            if worker is not None:
                _attend(future, signs, worker)
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _signalling(coroutine: Coroutine[Any, Any, _Result], signs: _Signs) -> _Result:
    _signs.set(signs)
    return await coroutine


def _attend(future: Future[Any], signs: _Signs, worker: Worker) -> None:
    """Wait until the future is done. Raises `Stopped` when the worker's job is to end."""
    seen = 0
    while not wait([future], timeout=_LOOK_S).done:
        if signs.count > seen:
            seen = signs.count
            worker.poll()
        worker.look()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
