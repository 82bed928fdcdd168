"""The store server's connections: few of them, and each with a request soon, whoever opens them."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 64
"""Connections at a time, and an eighth of what the process may open where that is less: a download takes three
descriptors, and the trainer's own are in the same process."""
HEADER_BYTES = 16 << 10
REQUEST_S = 10.0
"""From a connection's start, or the end of its last answer, to the end of a request's header."""


def most_connections() -> int:
    """By the process's limit of open files as it is now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(4, min(MOST, soft // 8))


class BoundedProtocol(H11Protocol):
    """uvicorn's, with a limit on connections and on the time that one waits for its request.

    Where there are too many, the one that has waited longest is closed; one that is being answered never is, and a new
    one that finds only such is closed itself.
    """

    _limit: asyncio.TimerHandle | None = None
    """Ends its wait, while it waits for a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > most_connections():
            there: list[Any] = [one for one in self.connections if one is not self]
            waiting = [one for one in there if one._limit is not None]
            min(waiting, key=lambda one: one._limit.when(), default=self).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_more()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def drop(self) -> None:
        """Close it at once, whatever is under way."""
        self._wait_no_more()
        self.connections.discard(self)
        self.transport.abort()

    def _wait(self) -> None:
        self._wait_no_more()
        self._limit = self.loop.call_later(REQUEST_S, self.drop)

    def _wait_no_more(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
