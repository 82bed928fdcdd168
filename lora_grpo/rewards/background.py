"""The event loop that async reward functions share.

One loop for the process's life, in a thread of its own: a client that a reward function keeps between steps stays
bound to a loop that lives, and a caller that runs inside a loop itself (a notebook) can still wait.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any


def run_in_background(awaitable: Awaitable[Any]) -> Future[Any]:
    """Starts `awaitable` at once; the future gives its result, and cancelling the future cancels it."""
    return asyncio.run_coroutine_threadsafe(_await(awaitable), _loop())


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lora_grpo-rewards", daemon=True).start()
    return loop
