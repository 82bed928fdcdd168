"""Versions on all replicas or on none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.base_reading import BaseReading
from lora_grpo.engines.delivery.canary import CanaryReport
from lora_grpo.engines.server.client import Client, Unreachable
from lora_grpo.engines.server.connect import connect, models, slots
from lora_grpo.engines.server.in_use import InUse, Proofs
from lora_grpo.engines.server.names import Names, resolver_name
from lora_grpo.engines.server.pool import Pool, scoring
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.engines.server.returning import FIRST_PAUSE_S, Returning
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, LoraGrpoError, UnknownVersion
from lora_grpo.types import LogProbs

OnFailure: TypeAlias = Literal["raise", "drop"]
"""What becomes of a load that one replica fails: it fails on all of them, or that replica leaves the rotation."""

Outcome: TypeAlias = tuple[LogProbs, CanaryReport | None]
"""What a replica answers for a version, and the verdict on it where somebody said what to expect."""

_LOAD_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """How an engine treats its replicas; see `VLLMServerEngine`."""

    max_loras: int
    concurrency: int
    on_failure: OnFailure
    patience_s: float
    resolves: bool


class Fleet:
    """The replicas of one engine. Every method runs in the engine's loop."""

    def __init__(self, replicas: list[Replica], names: Names, rank_folder: Path | None, settings: Settings) -> None:
        self.replicas, self.names, self.settings = replicas, names, settings
        self.in_use = InUse()
        self.proofs = Proofs(self.in_use)
        self.pool = Pool(replicas, settings.concurrency, self.lost)
        self._returning = Returning(
            self.in_use, self.proofs, self.named, rank_folder, settings.patience_s, self.pool.notify
        )
        self._changing = asyncio.Lock()

    @classmethod
    async def connect(
        cls, clients: Sequence[Client], names: Names, rank_folder: Path | None, settings: Settings
    ) -> Fleet:
        """Check every server, and have them forget what dead runs left there."""
        facts = await asyncio.gather(*(connect(client, rank_folder) for client in clients))
        for client, other in zip(clients, facts, strict=True):
            if (other.root, other.max_model_len) != (facts[0].root, facts[0].max_model_len):
                raise ConfigError(
                    f"{client.url} serves {other.root} with max_model_len={other.max_model_len}, {clients[0].url} "
                    f"{facts[0].root} with {facts[0].max_model_len}; start all replicas alike"
                )
        replicas = [Replica(*pair, settings.resolves) for pair in zip(clients, facts, strict=True)]
        fleet = cls(replicas, names, rank_folder, settings)
        await asyncio.gather(*(fleet._sweep(replica) for replica in fleet.replicas))
        names.sweep()
        return fleet

    @property
    def serving(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "serving"]

    async def load(self, served: Served, expected: LogProbs | None) -> CanaryReport | None:
        """Put a version into use on every replica, proven, or on none.

        `expected` are the trainer's log-probs of `sequences`; without them the replicas are compared with one another
        only, and there is no verdict. Raises `DeliveryError` or `EngineError` naming each replica that failed, and
        `ConfigError` where nothing is expected although a probe is kept.
        """
        self.proofs.require_expected(served.version, expected)
        async with self._changing:
            try:
                answers, verdict = await self._prove(served, expected)
            except BaseException:
                await self._drop(served)
                raise
            served.answers = answers if expected is None else expected
            self.in_use.add(served)
            for replica in self.replicas:
                if served.name not in replica.names:
                    self.lost(replica, EngineError(f"{replica.url} has yet to load {served.version}"))
            await self._retire(served)
            return verdict

    async def prove_again(self, served: Served) -> CanaryReport | None:
        """Score a version in use on every replica; one that differs takes it out of use, unless it may be dropped."""
        async with self._changing:
            if self.in_use.known(served.version) is not served:
                raise EngineError(f"{served.version} was unloaded meanwhile; load it again")
            try:
                _, verdict = await self._prove(served, served.answers)
            except DeliveryError:
                await self._drop(served)
                raise
            self.in_use.add(served)
            return verdict

    async def unload(self, served: Served) -> None:
        async with self._changing:
            await self._drop(served)

    async def close(self) -> None:
        """Have the servers forget this engine's versions; those that do not answer forget them when they restart."""
        for served in self.in_use.all():
            await self._drop(served)
        await asyncio.gather(*(replica.client.close() for replica in self.replicas))

    def named(self, version: AdapterVersion) -> Served:
        return Served(version, resolver_name(version) if self.settings.resolves else self.names.fresh(version))

    async def slots(self) -> dict[str, int | None]:
        """Each server's max_loras by URL, where it says."""
        return {replica.url: await slots(replica.client) for replica in self.serving}

    async def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        return [one for read in await asyncio.gather(*(r.read_base(shapes) for r in self.serving)) for one in read]

    def lost(self, replica: Replica, error: Exception) -> None:
        self._returning.lost(replica, error)

    # Loading

    async def _present(self) -> list[Replica]:
        """The replicas that a load must reach: those in rotation, the others waited for unless they may be dropped."""
        await asyncio.gather(*(self._look(replica) for replica in self.serving))
        for replica in self.replicas:
            if replica.state == "lost":
                self._returning.begin(replica)
        if self.settings.on_failure == "raise":
            await asyncio.gather(*(self._returning.end(replica) for replica in self.replicas))
        present = self.serving
        absent = [replica for replica in self.replicas if replica.state != "serving"]
        if absent and (self.settings.on_failure == "raise" or not present):
            raise EngineError(
                f"{len(absent)} of {len(self.replicas)} replicas cannot take a version: "
                + "; ".join(replica.trouble for replica in absent)
            )
        return present

    async def _look(self, replica: Replica) -> None:
        try:
            await replica.look()
        except EngineError as error:
            self.lost(replica, error)

    async def _prove(self, served: Served, expected: LogProbs | None) -> Outcome:
        replicas = await self._present()
        outcomes = await asyncio.gather(
            *(self._take(replica, served, expected) for replica in replicas), return_exceptions=True
        )
        return self._judge(replicas, outcomes, served, expected)

    async def _take(self, replica: Replica, served: Served, expected: LogProbs | None) -> Outcome:
        """Load a version on one replica and score it; tried again after a pause, on a replica that came back too.

        One that is in use is not loaded again: that it answers otherwise than before has to be heard of, and whoever
        samples from it needs its name.
        """
        known, pause_s = self.in_use.known(served.version) is served, FIRST_PAUSE_S
        for attempt in range(1, _LOAD_ATTEMPTS + 1):
            try:
                if served.name not in replica.names:
                    await replica.give(served)
                answers = await self._score(replica, served)
                return answers, None if expected is None else self.proofs.compare(replica, served, answers, expected)
            except (EngineError, DeliveryError, UnknownVersion) as error:
                if isinstance(error, Unreachable):
                    self.lost(replica, error)
                dropped = replica.state != "serving" and self.settings.on_failure == "drop"
                if attempt == _LOAD_ATTEMPTS or dropped or (known and isinstance(error, DeliveryError)):
                    raise
            if not known:
                await self._forget(replica, served)
            await asyncio.sleep(pause_s)
            pause_s *= 2
            await self._returning.end(replica)
        raise AssertionError("the last attempt returns or raises")

    async def _score(self, replica: Replica, served: Served) -> LogProbs:
        if replica.state != "serving":
            return await replica.score(replica.names[served.name], self.proofs.sequences)
        asks = [scoring(served, ids) for ids in self.proofs.sequences]
        return [answers[0] for answers in await self.pool.run([[ask] for ask in asks], only=replica)]

    def _judge(
        self,
        replicas: list[Replica],
        outcomes: Sequence[Outcome | BaseException],
        served: Served,
        expected: LogProbs | None,
    ) -> Outcome:
        failed = {r: o for r, o in zip(replicas, outcomes, strict=True) if isinstance(o, BaseException)}
        proven = {r: o for r, o in zip(replicas, outcomes, strict=True) if not isinstance(o, BaseException)}
        for outcome in failed.values():
            if not isinstance(outcome, LoraGrpoError):
                raise outcome
        if failed and (self.settings.on_failure == "raise" or not proven):
            kind = DeliveryError if any(isinstance(o, DeliveryError) for o in failed.values()) else EngineError
            listed = "; ".join(f"{replica.url}: {outcome}" for replica, outcome in failed.items())
            raise kind(f"{served.version} failed on {len(failed)} of {len(replicas)} replicas: {listed}")
        for replica, outcome in failed.items():
            self.lost(replica, EngineError(f"{replica.url} failed to prove {served.version}: {outcome}"))
        answers, verdict = next(iter(proven.values()))
        if expected is None:
            for replica, (others, _) in proven.items():
                self.proofs.compare(replica, served, others, answers)
        return answers, verdict

    async def _forget(self, replica: Replica, served: Served) -> None:
        """Unload a version from a replica, if it can be reached; where not, it loses its names or is asked for them."""
        if replica.state != "serving":
            return
        try:
            await replica.forget(served)
        except EngineError as error:
            self.lost(replica, error)

    async def _drop(self, served: Served) -> None:
        self.in_use.remove(served)
        await asyncio.gather(*(self._forget(replica, served) for replica in self.replicas))

    async def _retire(self, newest: Served) -> None:
        """Unload the least recently used versions beyond those that the slots hold; never one that is being used."""
        every = self.in_use.all()
        idle = [served for served in every if not served.users and served is not newest]
        for served in idle[: max(0, len(every) - self.settings.max_loras)]:
            await self._drop(served)

    async def _sweep(self, replica: Replica) -> None:
        for name in await models(replica.client):
            if self.names.is_leftover(name):
                await replica.unload(name)
