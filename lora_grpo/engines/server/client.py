"""One server's HTTP interface, through the openai client: its connections and retries, our deadlines and errors."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import openai

from lora_grpo.errors import ConfigError, EngineError

RETRIES = 2
"""Of a request that met a dropped connection or a 5xx; the openai client waits longer before each."""

QUICK_TIMEOUT_S = 10.0
"""For what a server answers at once or not at all."""

LOOK_EVERY_S = 3.0
"""While requests are in flight. A server that fails a look counts as gone."""


class Unreachable(EngineError):
    """A server that gave no answer: down, restarting, broken, or silent for longer than the timeout."""


class Refused(EngineError):
    """A server that answered with an error."""


class Missing(Refused):
    """One that has no such route, model or adapter."""


class Client:
    """Asks one server. Raises `Unreachable`, `Refused`, or `ConfigError` for a wrong API key.

    While an answer is owed, the server's health is looked at: one that is gone has no answers to wait for.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        """`url` is one of `server_addresses`. `timeout_s` bounds a completion, waiting in line and further
        tries included: the openai client would send what timed out to the same server again."""
        self.url = url
        self._timeout_s = timeout_s
        key = api_key or "none"
        self._asking = openai.AsyncOpenAI(base_url=self.url, api_key=key, timeout=None, max_retries=RETRIES)
        self._changing = self._asking.with_options(max_retries=0)
        # Connections of its own: those that completions wait on may all be taken.
        self._looking = openai.AsyncOpenAI(base_url=self.url, api_key=key, timeout=QUICK_TIMEOUT_S, max_retries=1)
        self._owing = 0
        self._watching: asyncio.Task[EngineError] | None = None

    async def look(self, path: str) -> str:
        """GET, at once or not at all; tried a second time, since a busy server may miss one."""
        return await self._answer(path, partial(self._looking.get, path, cast_to=str))

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST what changes nothing on the server; tried again where that may help."""
        answer = self._answer(path, partial(self._asking.post, path, cast_to=str, body=body))
        text = await self._owed(path, answer, self._timeout_s)
        with reading(self.url, path, text):
            return {**json.loads(text)}

    async def change(self, path: str, body: dict[str, Any], *, timeout_s: float | None = None) -> None:
        """POST what changes the server, once; one that fails at that has refused it."""
        answer = self._answer(path, partial(self._changing.post, path, cast_to=str, body=body), fails_from=600)
        await self._owed(path, answer, timeout_s or self._timeout_s)

    async def close(self) -> None:
        await self._asking.close()
        await self._looking.close()

    async def _owed(self, path: str, answer: Coroutine[Any, Any, str], timeout_s: float) -> str:
        """The answer; raises what the last look did when the server is gone, and ends the request."""
        asked = asyncio.create_task(answer)
        watching = self._watching = self._watching or asyncio.create_task(self._until_gone())
        self._owing += 1
        try:
            await asyncio.wait({asked, watching}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return await asked
            if watching.done():
                raise await watching
            raise Unreachable(f"{self.url} gave no answer to {path} within {timeout_s:g} s")
        finally:
            asked.cancel()
            self._owing -= 1
            if not self._owing:
                watching.cancel()
                self._watching = None

    async def _until_gone(self) -> EngineError:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look("/health")
            except EngineError as error:
                return error

    async def _answer(self, path: str, request: Callable[[], Awaitable[str]], *, fails_from: int = 500) -> str:
        """A server that answers with a status of `fails_from` or above counts as one that cannot answer."""
        try:
            return str(await request())
        except openai.APIStatusError as error:
            status, body = error.status_code, error.body
            said = (isinstance(body, dict) and body.get("message")) or error.response.text.strip()[:500]
            if status in (401, 403):
                raise ConfigError(f"{self.url} refuses the API key ({said}); set VLLM_API_KEY, or api_key=") from None
            kind = Unreachable if status >= fails_from else Missing if status in (404, 405) else Refused
            raise kind(f"{self.url}{path} answered {status}: {said}") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Unreachable(f"{self.url} does not answer {path}: {type(cause).__name__}: {cause}") from None


@contextmanager
def reading(url: str, path: str, answer: object) -> Iterator[None]:
    """While an answer is taken apart: one of another form than vLLM's raises `EngineError`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineError(f"{url}{path} answered {str(answer)[:200]!r} ({error!r}); is it a vLLM server?") from None
