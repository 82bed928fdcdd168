"""One server: what it is, what it has loaded, and what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.base_reading import BaseReading
from lora_grpo.engines.server.base_route import BASE, not_read, readings
from lora_grpo.engines.server.client import QUICK_TIMEOUT_S, Client, Refused, Unreachable, reading
from lora_grpo.engines.server.connect import LOAD, UNLOAD, Facts, connect, models, started
from lora_grpo.engines.server.wire import COMPLETIONS, scoring_body, to_logprobs
from lora_grpo.errors import DeliveryError, EngineError
from lora_grpo.types import LogProbs, Sequences

State: TypeAlias = Literal["serving", "away", "lost"]
"""In rotation; out of it and being brought back; given up until the next load asks for it."""


@dataclass(eq=False)
class Served:
    """A version in use: the name it goes by, the log-probs it is known by, and how many calls need it."""

    version: AdapterVersion
    name: str
    answers: LogProbs = field(default_factory=list)
    users: int = 0


@dataclass(eq=False)
class Replica:
    """A server and what we know of it. Only the engine's loop touches one.

    `pulls`: it gets versions from a store by their names; else from their paths, by names that only this life of the
    process was told. `names` are what it knows versions by: their own name, or another where that one was tried on it
    in vain.
    """

    client: Client
    facts: Facts
    pulls: bool
    state: State = "serving"
    names: dict[str, str] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    in_flight: int = 0
    serves_base: bool = False
    trouble: str = ""
    returning: asyncio.Task[None] | None = None
    asked: Mapping[str, Sequence[int]] = field(default_factory=dict)
    base: list[BaseReading] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def mixes_base(self) -> bool:
        """Whether base and adapter requests may share a batch: vLLM's CPU kernels mix them up before 0.33, and no
        server says that it computes on a CPU."""
        return self.facts.release >= (0, 33)

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One completion. Raises `Unreachable` for a server that cannot answer, or no longer knows the name."""
        try:
            return await self.client.ask(COMPLETIONS, body)
        except Refused as refusal:
            if refusal.status == 404 or refusal.status >= 500:
                raise Unreachable(str(refusal)) from None
            raise

    async def score(self, name: str, sequences: Sequences) -> LogProbs:
        """Log-probs of tokens 1..T-1 of each sequence, by the model of that name."""
        bodies = [scoring_body(name, ids) for ids in sequences]
        answers = await asyncio.gather(*(self.ask(body) for body in bodies))
        return [to_logprobs(answer, body) for answer, body in zip(answers, bodies, strict=True)]

    async def give(self, served: Served) -> None:
        """Have the server take a version, under a name that it then knows it by."""
        await (self._pull(served) if self.pulls else self._load(served))

    async def _load(self, served: Served) -> None:
        """From its path. An answer that was lost on the way is looked for."""
        name = served.name if served.name not in self.tried else f"{served.name}.{len(self.tried)}"
        self.tried.add(name)
        try:
            await self.client.change(LOAD, {"lora_name": name, "lora_path": str(served.version.path)})
        except Unreachable:
            if name not in await models(self.client):
                raise
        self.names[served.name] = name

    async def _pull(self, served: Served) -> None:
        """By the server's resolver: one token is asked of it."""
        try:
            await self.client.ask(COMPLETIONS, scoring_body(served.name, [1]) | {"prompt_logprobs": None})
        except Refused as refusal:
            if refusal.status != 404:
                raise
            raise EngineError(
                f"{self.url} cannot resolve {served.name}: {refusal}; the reason is in the server's log (is "
                "LORA_GRPO_STORE_URL set there, and the store server up?)"
            ) from None
        self.names[served.name] = served.name

    async def unload(self, name: str) -> None:
        """Have the server forget a name. What it holds in memory stays until newer adapters take its place."""
        try:
            await self.client.change(UNLOAD, {"lora_name": name}, timeout_s=QUICK_TIMEOUT_S)
        except Refused as refusal:
            if refusal.status != 404:
                raise

    async def forget(self, served: Served) -> None:
        name = self.names.pop(served.name, None)
        if name is not None:
            await self.unload(name)

    async def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        """What each of the server's workers reads of the base's tensors; remembered, for when it comes back."""
        self.asked, self.base = shapes, await self._read_base(shapes)
        return self.base

    async def _read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        body = {"tensors": {name: list(shape) for name, shape in shapes.items()}}
        try:
            answer = await self.client.ask(BASE, body)
        except Refused as refusal:
            if refusal.status not in (404, 405):
                raise
            return [not_read(self.url, shapes)]
        with reading(self.url, BASE, answer):
            return readings(self.url, answer)

    async def require_same_base(self) -> None:
        """Raises `DeliveryError` unless the base reads as it did when it was compared with the trainer's."""
        if not self.base:
            return
        again = await self._read_base(self.asked)
        if [one.tensors for one in again] != [one.tensors for one in self.base]:
            raise DeliveryError(f"{self.url} came back with a base of other values than it had, under the same name")

    async def look(self) -> None:
        """Raises `Unreachable` when the server is away, or has forgotten what it had since it was last looked at."""
        await self.client.look("/health")
        listed = (await models(self.client)).keys()
        if missing := set(self.names.values()) - listed:
            raise Unreachable(f"{self.url} no longer knows {', '.join(sorted(missing))}: it restarted")
        await self.require_life(self.facts.started)

    async def require_life(self, life: str | None) -> None:
        """Raises `Unreachable` unless the process that answers is the one that started then."""
        if await started(self.client) != life:
            raise Unreachable(f"{self.url} restarted")

    async def reconnect(self, rank_folder: Path | None) -> None:
        """After an absence: check the server as a new one, and take note of which names it still has."""
        facts = await connect(self.client, rank_folder)
        if (facts.root, facts.max_model_len) != (self.facts.root, self.facts.max_model_len):
            raise DeliveryError(
                f"{self.url} came back with {facts.root} (max_model_len={facts.max_model_len}) where it had "
                f"{self.facts.root} ({self.facts.max_model_len})"
            )
        if facts.started != self.facts.started or facts.started is None:
            self.tried.clear()
        listed = await models(self.client)
        self.names = {own: name for own, name in self.names.items() if name in listed}
        self.facts = facts
