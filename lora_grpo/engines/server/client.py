"""One server's HTTP interface: requests through the openai client, with our deadlines and errors, and their answers."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import openai

from lora_grpo.engines.requests import Asked, sampling_fields
from lora_grpo.errors import ConfigError, DeliveryError, EngineError
from lora_grpo.types import Completion, Sampling

Result = TypeVar("Result")

COMPLETIONS = "/v1/completions"

QUICK_TIMEOUT_S = 10.0
LOOK_EVERY_S = 3.0
"""While requests are in flight. A server that fails a look counts as gone."""


class Unreachable(EngineError):
    """A server that gave no answer: down, restarting, broken, or silent for longer than the timeout."""


class Refused(EngineError):
    """A server that answered with an error."""


class Missing(Refused):
    """One that has no such route, model or adapter."""


class Client:
    """Asks one server. Raises `Unreachable`, `Refused`, or `ConfigError` for a wrong API key. While an answer is owed,
    the server's health is looked at: one that is gone has no answers to wait for."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        """`timeout_s` bounds a completion, retries and time in line included; openai's own would resend it there."""
        self.url, self._timeout_s = url, timeout_s
        key = api_key or "none"
        self._asking = openai.AsyncOpenAI(base_url=self.url, api_key=key, timeout=None, max_retries=2)
        self._changing = self._asking.with_options(max_retries=0)
        # Connections of its own: those that completions wait on may all be taken.
        self._looking = openai.AsyncOpenAI(base_url=self.url, api_key=key, timeout=QUICK_TIMEOUT_S, max_retries=1)
        self._owing = 0
        self._watching: asyncio.Task[EngineError] | None = None

    async def look(self, path: str) -> str:
        """GET, at once or not at all; tried a second time, since a busy server may miss one."""
        return await self._answer(self._looking.get, path)

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST what changes nothing on the server; tried again where that may help."""
        text = await self._owed(path, self._answer(self._asking.post, path, body=body), self._timeout_s)
        with self.reading(path, text):
            return {**json.loads(text)}

    async def complete(self, model: str, asked: Asked, seed: int, placeholders: Sequence[int]) -> Completion:
        """Raises `EngineError` for one that was cut or lacks log-probs, and as `_choice`."""
        choice = await self._choice(model, asked.ids, sampling_fields(asked.sampling, seed, placeholders))
        token_ids, reason, most = tuple(choice["token_ids"] or ()), choice["finish_reason"], asked.sampling.max_tokens
        if reason not in ("stop", "length"):
            raise EngineError(f"a completion by {model} ended as {reason!r}, not by stopping")
        if reason == "length" and len(token_ids) < most:
            fix = "start it without --override-generation-config and --generation-config"
            raise EngineError(f"the server cut a completion at {len(token_ids)} of max_tokens={most}; {fix}")
        logprobs = tuple((choice["logprobs"] or {}).get("token_logprobs") or ())
        if len(logprobs) != len(token_ids) or not _all_finite(logprobs):
            raise EngineError(f"a completion by {model} has {len(token_ids)} tokens with log-probs {logprobs}")
        version = None if asked.adapter is None else asked.adapter.number
        return Completion(choice["text"], token_ids, logprobs, reason, version)

    async def score(self, model: str, ids: Sequence[int]) -> list[float]:
        """Log-probs of tokens 1..T-1 of a prompt, after which a server generates one token at least."""
        fields = sampling_fields(Sampling(max_tokens=1, temperature=0.0), 0) | {"prompt_logprobs": 0}
        entries = (await self._choice(model, ids, fields))["prompt_logprobs"] or []
        try:
            logprobs = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]
        except (ValueError, KeyError, TypeError):
            logprobs = [None]
        if not _all_finite(logprobs):
            raise EngineError(f"{model} did not score every token of a prompt of {len(ids)}")
        return logprobs

    async def _choice(self, model: str, ids: Sequence[int], fields: dict[str, Any]) -> Any:
        """What a model makes of a prompt; `DeliveryError` for another model's answer, or to another prompt. Every
        setting is said, since a server has its model's own defaults."""
        body = fields | {"model": model, "prompt": list(ids), "return_token_ids": True, "repetition_penalty": 1.0}
        answer = await self.ask(COMPLETIONS, body | {"presence_penalty": 0.0, "frequency_penalty": 0.0})
        if answer.get("model") != model:
            why = "is a proxy in between, or VLLM_SKIP_MODEL_NAME_VALIDATION set on the server?"
            raise DeliveryError(f"{model} was asked and {answer.get('model')!r} answered; {why}")
        choice = (answer.get("choices") or [{}])[0]
        needed = {"text", "token_ids", "logprobs", "finish_reason", "prompt_token_ids", "prompt_logprobs"}
        if missing := needed - set(choice):
            raise EngineError(f"an answer by {model} lacks {', '.join(sorted(missing))}; is it a vLLM server?")
        if choice["prompt_token_ids"] != body["prompt"]:
            raise DeliveryError(f"{model} completed another prompt than the one it was sent")
        return choice

    async def change(self, path: str, body: dict[str, Any], *, quick: bool = False) -> None:
        """POST what changes the server, once; one that fails at that has refused it."""
        answer = self._answer(self._changing.post, path, fails_from=600, body=body)
        await self._owed(path, answer, QUICK_TIMEOUT_S if quick else self._timeout_s)

    @contextmanager
    def reading(self, path: str, answer: object) -> Iterator[None]:
        """While an answer is taken apart: one of another form than vLLM's raises `EngineError`."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            said = f"answered {str(answer)[:200]!r} ({error!r}); is it a vLLM server?"
            raise EngineError(f"{self.url}{path} {said}") from None

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

    async def _answer(self, ask: Callable[..., Awaitable[str]], path: str, fails_from: int = 500, **more: Any) -> str:
        """A server that answers with a status of `fails_from` or above counts as one that cannot answer."""
        try:
            return str(await ask(path, cast_to=str, **more))
        except openai.APIStatusError as error:
            status, content = error.status_code, error.body
            said = (isinstance(content, dict) and content.get("message")) or error.response.text.strip()[:500]
            if status in (401, 403):
                raise ConfigError(f"{self.url} refuses the API key ({said}); set VLLM_API_KEY, or api_key=") from None
            kind = Unreachable if status >= fails_from else Missing if status in (404, 405) else Refused
            raise kind(f"{self.url}{path} answered {status}: {said}") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Unreachable(f"{self.url} does not answer {path}: {type(cause).__name__}: {cause}") from None


async def together(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results; the first failure ends the others. (A TaskGroup whose task just failed forgets its own cancel.)"""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _all_finite(logprobs: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs)
