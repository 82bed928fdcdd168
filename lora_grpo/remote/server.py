"""A read-only HTTP server on a live run's versions, for replicas that share no disk with it.

    GET /versions/NUMBER         {"run": NAME, "number", "parent", "digest", "step", "created_at", "sizes"}
    GET /versions/NUMBER/FILE    the bytes of one of a version's two PEFT files

Every request needs `Authorization: Bearer TOKEN`. Errors are `{"error": SENTENCE}`: 401 for the token, 404 for a
version or file that there is not, 500 for a damaged store. Across a network that others can read, put a TLS proxy in
front: token and adapters travel as they are."""

import asyncio
import hmac
import os
import re
import resource
import socket
import threading
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, BinaryIO, NoReturn

import anyio
import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_grpo.adapters.asking.view import StoreView
from lora_grpo.adapters.files.disk import CHUNK_BYTES, reported
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import PEFT_FILES
from lora_grpo.errors import StoreError, UnknownVersion
from lora_grpo.remote.client import read_token

REQUEST_S = 10.0
"""From a connection's start, or the end of its last answer, to the end of a request's header."""
_STOP_TIMEOUT_S = 5
_STALL_S = 60.0
_PATH = re.compile(rf"/versions/([1-9][0-9]{{0,8}})(?:/({'|'.join(map(re.escape, PEFT_FILES))}))?")


class StoreServer:
    """Serves a store from a thread, within a `with` block, through a reader of its own: it takes no lock of the
    writer's, goes on while the writer is busy or closed, and changes nothing. Connections are few and short-lived (see
    `BoundedProtocol`), so that nobody can use up what this process may open or hold."""

    def __init__(self, store: StoreView, token: str | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Open `store` for reading and listen; `port=0` takes a free one. Without `token`, see `read_token`."""
        token = token or read_token()
        self._view = AdapterStore(store.root, store.archive, readonly=True)
        self.run = self._view.run
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with reported(f"listening for replicas on {host} port {port}"):
            self._socket = socket.create_server((host, port), family=family)
        # `backlog` also bounds how many connections asyncio accepts before it looks at the first.
        options: dict[str, Any] = {"http": BoundedProtocol, "backlog": 16, "timeout_graceful_shutdown": _STOP_TIMEOUT_S}
        options |= {"h11_max_incomplete_event_size": 16 << 10, "loop": "asyncio", "lifespan": "off", "ws": "none"}
        options |= {"log_config": None, "log_level": "error", "access_log": False, "server_header": False}
        self._server = uvicorn.Server(uvicorn.Config(store_app(self._view, token), **options))
        serve, name = partial(self._server.run, [self._socket]), "lora-grpo store server"
        self._thread = threading.Thread(target=serve, name=name, daemon=True)

    @property
    def url(self) -> str:
        """Where to reach it; by this machine's name when it listens on every address."""
        host, port = self._socket.getsockname()[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def wait(self) -> NoReturn:
        """Stay until interrupted; raises `StoreError` when the server ends by itself."""
        self._thread.join()
        raise StoreError(f"the store server at {self.url} ended unexpectedly; its log says why")

    def __enter__(self) -> "StoreServer":
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.__exit__()
                raise StoreError(f"the store server on {self.url} did not start; its log says why")
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(2 * _STOP_TIMEOUT_S)
        self._socket.close()
        self._view.close()


def store_app(view: StoreView, token: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing is told without the token, not even what there is. What reads from disk does in a worker thread."""
        request = Request(scope)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if hmac.compare_digest(given.encode("latin-1"), token.encode("latin-1")) and scheme.lower() == "bearer":
            response = await run_in_threadpool(_answer, view, request)
        else:
            sentence = "this store needs its bearer token; give both sides the same one in LORA_GRPO_STORE_TOKEN_FILE"
            response = _refusal(401, sentence, {"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    return app


def _answer(view: StoreView, request: Request) -> Response:
    if request.method not in ("GET", "HEAD"):
        return _refusal(405, "this store is read-only: it answers GET", {"Allow": "GET, HEAD"})
    asked = _PATH.fullmatch(request.scope["path"])
    if asked is None:
        there = f"/versions/NUMBER (1, 2, 3 and so on) and /versions/NUMBER/FILE, FILE being {' or '.join(PEFT_FILES)}"
        return _refusal(404, f"there is no {request.url.path}; there is {there}")
    number, name = int(asked[1]), asked[2]
    try:
        if name is None:
            return JSONResponse({"run": view.run, **view.manifest(number).fields()})
        with reported(f"reading version {number}"), ExitStack() as held:
            folder = held.enter_context(view.reading(number))
            return _FileResponse(held.enter_context(open(folder / name, "rb", buffering=0)), held.pop_all())
    except (UnknownVersion, StoreError) as error:
        return _refusal(404 if isinstance(error, UnknownVersion) else 500, str(error))


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


class _FileResponse(StreamingResponse):
    """Holds the version until the last byte is gone, or the client is or takes no more."""

    def __init__(self, stream: BinaryIO, held: ExitStack) -> None:
        size_bytes, chunks = os.fstat(stream.fileno()).st_size, iter(partial(stream.read, CHUNK_BYTES), b"")
        super().__init__(chunks, 200, {"Content-Length": str(size_bytes)}, "application/octet-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            with anyio.fail_after(_STALL_S):
                await send(message)

        with self._held:
            await super().__call__(scope, receive, sending)


def most_connections() -> int:
    """At most an eighth of the descriptors that the process may open: each takes three of them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 64 if soft == resource.RLIM_INFINITY else max(4, min(64, soft // 8))


class BoundedProtocol(H11Protocol):
    """uvicorn's, with a limit on connections and on the wait for a request. Where there are too many, the one that has
    waited longest is closed (none that is being answered), else the new one."""

    _limit: asyncio.TimerHandle
    """Ends its wait for a request; cancelled while there is one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit = self.loop.call_later(REQUEST_S, self.drop)
        if len(self.connections) > most_connections():
            waiting = [one for one in set[Any](self.connections) - {self} if not one._limit.cancelled()]
            min(waiting, key=lambda one: one._limit.when(), default=self).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._limit.cancel()

    def on_response_complete(self) -> None:
        self._limit.cancel()
        self._limit = self.loop.call_later(REQUEST_S, self.drop)
        super().on_response_complete()

    def drop(self) -> None:
        self.connections.discard(self)
        self.transport.abort()
