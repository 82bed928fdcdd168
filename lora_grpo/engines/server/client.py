"""One server's HTTP interface, through the openai client: its connections, timeouts and retries, our errors."""

from __future__ import annotations

import json
import re
from typing import Any

import openai

from lora_grpo.errors import ConfigError, EngineError

RETRIES = 2
"""Of a request that met a dropped connection or a 5xx; the openai client waits longer before each."""

_QUICK_TIMEOUT_S = 10.0


class Unreachable(EngineError):
    """A server that gave no answer: down, restarting, or silent for longer than the timeout."""


class Refused(EngineError):
    """A server that answered with an error; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Asks one server. Raises `Unreachable`, `Refused`, or `ConfigError` for a wrong API key."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        """`url` is the server's, with or without `/v1`. `timeout_s` bounds a completion, waiting in line included."""
        if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):
            raise ConfigError(f"{url!r} is no server's address; write one such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._asking = openai.AsyncOpenAI(
            base_url=self.url, api_key=api_key or "none", timeout=timeout_s, max_retries=RETRIES
        )
        self._changing = self._asking.with_options(max_retries=0)
        self._looking = self._asking.with_options(max_retries=0, timeout=_QUICK_TIMEOUT_S)

    async def look(self, path: str) -> str:
        """GET, at once or not at all."""
        return await self._answer(path, self._looking.get(path, cast_to=str))

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST what changes nothing on the server; tried again where that may help."""
        return _parsed(self.url, path, await self._answer(path, self._asking.post(path, cast_to=str, body=body)))

    async def change(self, path: str, body: dict[str, Any]) -> None:
        """POST what changes the server, once."""
        await self._answer(path, self._changing.post(path, cast_to=str, body=body))

    async def close(self) -> None:
        await self._asking.close()

    async def _answer(self, path: str, request: Any) -> str:
        try:
            return str(await request)
        except openai.APIStatusError as error:
            said = _message(error.response.text)
            if error.status_code in (401, 403):
                raise ConfigError(
                    f"{self.url} refuses the API key ({said}); pass api_key=, or set VLLM_API_KEY to the server's"
                ) from None
            raise Refused(f"{self.url}{path} answered {error.status_code}: {said}", error.status_code) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Unreachable(f"{self.url} does not answer {path}: {type(cause).__name__}: {cause}") from None


def _parsed(url: str, path: str, text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise EngineError(f"{url}{path} answered {text[:200]!r}; is it a vLLM server?")
    return answer


def _message(text: str) -> str:
    """The sentence in an error's body, or the body."""
    try:
        answer = json.loads(text)
        return str(answer["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:500]
