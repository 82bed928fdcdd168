"""One server: what it is, has loaded and answers; and the versions in use, which every server is held to."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import LoadedVersions
from lora_grpo.engines.delivery.canary import MAX_BASE_NOISE_NATS, CanaryReport, Witness, compare
from lora_grpo.engines.names import BaseReading
from lora_grpo.engines.resolver import BASE_ROUTE
from lora_grpo.engines.server.client import QUICK_TIMEOUT_S, Client, Missing, Unreachable, reading
from lora_grpo.engines.server.connect import LOAD, UNLOAD, Facts, connect, models, started
from lora_grpo.engines.server.wire import COMPLETIONS, scoring_body
from lora_grpo.errors import ConfigError, DeliveryError, EngineError
from lora_grpo.types import LogProbs

PROBE_STEP = -1
"""The step of the version that `run_probe` makes, which compares what it answers itself."""

_READING = TypeAdapter(BaseReading)


@dataclass(eq=False)
class Served:
    """A version in use: the log-probs that it is known by (none: yet to be), how many calls need it, and the name by
    which servers pull it; without one they load it from its path."""

    version: AdapterVersion
    answers: LogProbs
    pulled_as: str | None
    users: int = 0


@dataclass(eq=False)
class Replica:
    """A server and what we know of it: `names` are what it knows versions by, `base_read` what its base was and what
    was asked then. Only the engine's loop touches one."""

    client: Client
    facts: Facts
    returning: asyncio.Task[None] | None = None
    trouble: str = ""
    names: dict[Served, str] = field(default_factory=dict)
    in_flight: int = 0
    serves_base: bool = False
    base_read: tuple[Mapping[str, Sequence[int]], list[BaseReading]] | None = None

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def state(self) -> Literal["serving", "away", "lost"]:
        """In rotation; out of it and being brought back; given up until the next load asks for it."""
        if self.returning is None:
            return "serving"
        return "lost" if self.returning.done() else "away"

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One completion. Raises `Unreachable` for a server that cannot answer, or no longer knows the name."""
        try:
            return await self.client.ask(COMPLETIONS, body)
        except Missing as refusal:
            raise Unreachable(str(refusal)) from None

    async def load(self, version: AdapterVersion, name: str) -> None:
        """From its path. An answer that was lost on the way is looked for."""
        try:
            await self.client.change(LOAD, {"lora_name": name, "lora_path": str(version.path)})
        except Unreachable:
            if name not in await models(self.client):
                raise

    async def pull(self, name: str) -> None:
        """By the server's resolver: one token is asked of it."""
        try:
            await self.client.ask(COMPLETIONS, scoring_body([1]) | {"model": name, "prompt_logprobs": None})
        except Missing as refusal:
            why = "its log says why (is LORA_GRPO_STORE_URL set there, and the store server up?)"
            raise EngineError(f"{self.url} cannot resolve {name}: {refusal}; {why}") from None

    async def unload(self, name: str) -> None:
        """Have the server forget a name. What it holds in memory stays until newer adapters take its place."""
        with suppress(Missing):
            await self.client.change(UNLOAD, {"lora_name": name}, timeout_s=QUICK_TIMEOUT_S)

    async def forget(self, served: Served) -> None:
        name = self.names.pop(served, None)
        if name is not None:
            await self.unload(name)

    async def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        """What each of the server's workers reads of the base's tensors."""
        body = {"tensors": {name: list(shape) for name, shape in shapes.items()}}
        try:
            answer = await self.client.ask(BASE_ROUTE, body)
        except Missing:
            reason = "the server does not have the lora_grpo plugin's route"
            return [BaseReading(self.url, {}, dict.fromkeys(shapes, reason))]
        with reading(self.url, BASE_ROUTE, answer):
            workers = [{**one, "where": f"{self.url} ({one['where']})"} for one in answer["workers"]]
            return [_READING.validate_python(one) for one in workers]

    async def require_same_base(self) -> None:
        """Raises `DeliveryError` unless the base reads as it did when it was compared with the trainer's."""
        if self.base_read is None:
            return
        shapes, read = self.base_read
        if [one.tensors for one in await self.read_base(shapes)] != [one.tensors for one in read]:
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
            raise Unreachable(f"{self.url} restarted, or is the address of several servers")

    async def reconnect(self, rank_folder: Path | None) -> None:
        """After an absence: check the server as a new one, and take note of which names it still has."""
        facts = await connect(self.client, rank_folder)
        if facts.model != self.facts.model:
            raise DeliveryError(f"{self.url} came back with {facts.model} where it had {self.facts.model}")
        listed = await models(self.client)
        self.names = {served: name for served, name in self.names.items() if name in listed}
        self.facts = facts


@dataclass(frozen=True)
class KeptProbe:
    """The probe that replicas were proven with: files that stay, what a trainer computes with them, noise in nats."""

    served: Served
    witness: Witness
    noise: float


class InUse(LoadedVersions[Served]):
    """A version is known by its answers to `sequences`, and may be mistaken for any other that is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.probe: KeptProbe | None = None
        self.sequences: list[list[int]] = []

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion | None]) -> Iterator[list[Served | None]]:
        """The versions as they are served (None: the base), kept in use meanwhile and made the most recently used."""
        wanted = [None if version is None else self.find(version) for version in versions]
        distinct = list(dict.fromkeys(served for served in wanted if served is not None))
        for served in distinct:
            self.add(served)
            served.users += 1
        try:
            yield wanted
        finally:
            for served in distinct:
                served.users -= 1

    def require_expected(self, served: Served) -> None:
        """Raises `ConfigError` where a trainer has shown itself, and nobody says what it computes with this version."""
        if not served.answers and self.probe is not None and served.version.step != PROBE_STEP:
            said = f"{served.version} cannot be proven: replicas compared with one another may all be wrong alike"
            how = "load it by NativeSync, or pass expected= (the trainer's log-probs of the probe's sequences)"
            raise ConfigError(f"{said}; {how}")

    def compare(self, replica: Replica, served: Served, answers: LogProbs) -> CanaryReport:
        """Raises `DeliveryError` naming the replica when it answers otherwise than expected."""
        others, noise = [known.answers for known in self.all() if known is not served], MAX_BASE_NOISE_NATS
        if self.probe is not None:
            others, noise = [*others, self.probe.witness.base], self.probe.noise
        try:
            return compare(answers, served.answers, others, noise)
        except DeliveryError as error:
            raise DeliveryError(f"{replica.url} does not serve {served.version}: {error}") from None
