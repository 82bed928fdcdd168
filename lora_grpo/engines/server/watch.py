"""Requests that a server will never answer, ended: one that shuts down closes its door and forgets those inside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from lora_grpo.errors import EngineError

_Result = TypeVar("_Result")

LOOK_EVERY_S = 3.0
"""While requests are in flight. A server that fails two looks in a row counts as gone."""


class Watch:
    """Looks after one server for as long as it owes answers. `look` raises `EngineError` where the server is gone."""

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._owed = 0
        self._watching: asyncio.Task[EngineError] | None = None

    async def over(self, request: Coroutine[Any, Any, _Result]) -> _Result:
        """The request's answer; raises what the last look did when the server is gone, and ends the request."""
        asked = asyncio.create_task(request)
        watching = self._watching = self._watching or asyncio.create_task(self._until_gone())
        self._owed += 1
        try:
            await asyncio.wait({asked, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise await watching
            return await asked
        finally:
            asked.cancel()
            self._owed -= 1
            if not self._owed:
                watching.cancel()
                self._watching = None

    async def _until_gone(self) -> EngineError:
        failed = False
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._look()
                failed = False
            except EngineError as error:
                if failed:
                    return error
                failed = True
