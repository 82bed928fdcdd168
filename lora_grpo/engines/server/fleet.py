"""Versions on all replicas or on none, and replicas that fall out of rotation and come back proven."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.canary import CanaryReport
from lora_grpo.engines.server.client import Client, Unreachable
from lora_grpo.engines.server.connect import connect, models, slots
from lora_grpo.engines.server.names import Names, resolver_name
from lora_grpo.engines.server.pool import Pool, scoring
from lora_grpo.engines.server.proofs import KeptProbe, Proofs
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, LoraGrpoError, UnknownVersion

OnFailure: TypeAlias = Literal["raise", "drop"]
"""What becomes of a load that one replica fails: it fails on all of them, or that replica leaves the rotation."""

_LOAD_ATTEMPTS = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0


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
        self.in_use: dict[Path, Served] = {}
        self.pool = Pool(replicas, settings.concurrency, self.lost)
        self.proofs = Proofs(self.in_use.values())
        self._rank_folder = rank_folder
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
        fleet = cls([Replica(*pair) for pair in zip(clients, facts, strict=True)], names, rank_folder, settings)
        await asyncio.gather(*(fleet._sweep(replica) for replica in fleet.replicas))
        names.sweep()
        return fleet

    async def load(self, served: Served, expected: list[list[float]] | None) -> CanaryReport | None:
        """Put a version into use on every replica, proven, or on none.

        `expected` are the trainer's log-probs of `sequences`; without them the replicas are compared with one another
        only, and there is no verdict. Raises `DeliveryError` or `EngineError` naming each replica that failed.
        """
        async with self._changing:
            replicas = await self._present()
            try:
                outcomes = await asyncio.gather(
                    *(self._take(replica, served, expected) for replica in replicas), return_exceptions=True
                )
                answers, verdict = self._judge(replicas, outcomes, served, expected)
            except BaseException:
                await self._take_back(served)
                raise
            served.answers = answers if expected is None else expected
            self.in_use[served.version.path] = served
            for replica in self.replicas:
                if served.name not in replica.names:
                    self.lost(replica, EngineError(f"{replica.url} has yet to load {served.version}"))
            await self._retire(served)
            return verdict

    async def prove_again(self, served: Served) -> CanaryReport:
        """Score a version in use on every replica; one that differs takes it out of use. Raises as `load`."""
        async with self._changing:
            replicas = await self._present()
            try:
                answers = await asyncio.gather(*(self.score(replica, served) for replica in replicas))
                pairs = zip(replicas, answers, strict=True)
                reports = [self.proofs.compare(replica, served, own, served.answers) for replica, own in pairs]
                return reports[0]
            except DeliveryError:
                await self._drop(served)
                raise

    async def unload(self, served: Served) -> None:
        async with self._changing:
            await self._drop(served)

    async def close(self) -> None:
        """Have the servers forget this engine's versions; those that do not answer forget them when they restart."""
        for served in list(self.in_use.values()):
            await self._drop(served)
        await asyncio.gather(*(replica.client.close() for replica in self.replicas))

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion | None]) -> Iterator[list[Served | None]]:
        """The versions as they are served (None: the base), kept in use meanwhile and made the most recently used.

        Raises `UnknownVersion` for one that is not loaded.
        """
        wanted = [None if version is None else self.find(version) for version in versions]
        distinct = list(dict.fromkeys(served for served in wanted if served is not None))
        for served in distinct:
            self.in_use[served.version.path] = self.in_use.pop(served.version.path)
            served.users += 1
        try:
            yield wanted
        finally:
            for served in distinct:
                served.users -= 1

    def find(self, version: AdapterVersion) -> Served:
        served = self.in_use.get(version.path)
        if served is None or served.version.digest != version.digest:
            held = ", ".join(str(known.version) for known in self.in_use.values()) or "none"
            raise UnknownVersion(f"{version} is not loaded (loaded: {held}); call engine.load(version) first")
        return served

    def named(self, version: AdapterVersion) -> Served:
        """A version under the name that servers are to know it by."""
        return Served(version, resolver_name(version) if self.settings.resolves else self.names.fresh(version))

    async def slots(self) -> dict[str, int | None]:
        """Each server's max_loras by URL, where it says."""
        return {replica.url: await slots(replica.client) for replica in self.replicas if replica.state == "serving"}

    def lost(self, replica: Replica, error: Exception) -> None:
        """Take a replica out of rotation and try to bring it back."""
        if replica.state == "serving":
            replica.trouble = str(error)
            self._bring_back(replica)

    async def score(self, replica: Replica, served: Served | None) -> list[list[float]]:
        """One replica's log-probs of `sequences`, by a version that it has or by the base."""
        if replica.state != "serving":
            name = replica.facts.base if served is None else replica.names[served.name]
            return await replica.score(name, self.proofs.sequences)
        asks = [scoring(served, ids) for ids in self.proofs.sequences]
        return [answers[0] for answers in await self.pool.run([[ask] for ask in asks], only=replica)]

    # Loading

    async def _present(self) -> list[Replica]:
        """The replicas that a load must reach: those in rotation, the others waited for unless they may be dropped."""
        await asyncio.gather(*(self._look(replica) for replica in self.replicas if replica.state == "serving"))
        for replica in self.replicas:
            if replica.state == "lost":
                self._bring_back(replica)
        if self.settings.on_failure == "raise":
            await asyncio.gather(*(self._returned(replica) for replica in self.replicas))
        present = [replica for replica in self.replicas if replica.state == "serving"]
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

    async def _take(
        self, replica: Replica, served: Served, expected: list[list[float]] | None
    ) -> tuple[list[list[float]], CanaryReport | None]:
        """Load a version on one replica and score it; tried again after a pause, on a replica that came back too."""
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, _LOAD_ATTEMPTS + 1):
            try:
                if served.name not in replica.names:
                    await self._give(replica, served)
                answers = await self.score(replica, served)
                return answers, None if expected is None else self.proofs.compare(replica, served, answers, expected)
            except (EngineError, DeliveryError) as error:
                if isinstance(error, Unreachable):
                    self.lost(replica, error)
                if attempt == _LOAD_ATTEMPTS or (replica.state != "serving" and self.settings.on_failure == "drop"):
                    raise
            await self._forget(replica, served)
            await asyncio.sleep(pause_s)
            pause_s *= 2
            await self._returned(replica)
        raise AssertionError("the last attempt returns or raises")

    async def _give(self, replica: Replica, served: Served) -> None:
        if self.settings.resolves:
            await replica.resolve(served)
        else:
            await replica.load(served)

    def _judge(
        self,
        replicas: list[Replica],
        outcomes: Sequence[tuple[list[list[float]], CanaryReport | None] | BaseException],
        served: Served,
        expected: list[list[float]] | None,
    ) -> tuple[list[list[float]], CanaryReport | None]:
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
            self.lost(replica, EngineError(f"{replica.url} failed to load {served.version}: {outcome}"))
        answers, verdict = next(iter(proven.values()))
        if expected is None:
            for replica, (others, _) in proven.items():
                self.proofs.compare(replica, served, others, answers)
        return answers, verdict

    async def _take_back(self, served: Served) -> None:
        await asyncio.gather(*(self._forget(replica, served) for replica in self.replicas))

    async def _forget(self, replica: Replica, served: Served) -> None:
        """Unload a version from a replica, if it can be reached; where not, it loses its names or is asked for them."""
        if replica.state != "serving":
            return
        try:
            await replica.forget(served)
        except EngineError as error:
            self.lost(replica, error)

    async def _drop(self, served: Served) -> None:
        self.in_use.pop(served.version.path, None)
        await self._take_back(served)

    async def _retire(self, newest: Served) -> None:
        """Unload the least recently used versions beyond those that the slots hold; never one that is being used."""
        idle = [served for served in self.in_use.values() if not served.users and served is not newest]
        for served in idle[: max(0, len(self.in_use) - self.settings.max_loras)]:
            await self._drop(served)

    async def _sweep(self, replica: Replica) -> None:
        for name in await models(replica.client):
            if self.names.is_leftover(name):
                await replica.unload(name)

    # Coming back

    def _bring_back(self, replica: Replica) -> None:
        replica.state = "away"
        replica.returning = asyncio.create_task(self._wait_for(replica))
        self.pool.notify()

    async def _returned(self, replica: Replica) -> None:
        if replica.state == "away" and replica.returning is not None:
            await asyncio.shield(replica.returning)

    async def _wait_for(self, replica: Replica) -> None:
        deadline, pause_s = time.monotonic() + self.settings.patience_s, _FIRST_PAUSE_S
        while replica.state == "away":
            try:
                await self._readmit(replica)
            except LoraGrpoError as error:
                replica.trouble = f"{error}"
                if time.monotonic() + pause_s > deadline:
                    replica.state = "lost"
                else:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self.pool.notify()

    async def _readmit(self, replica: Replica) -> None:
        """Put a server that answers again back into rotation: checked, probed, with everything in use, proven."""
        await replica.reconnect(self._rank_folder)
        if self.proofs.probe is not None:
            await self._prove_path(replica, self.proofs.probe)
        wanted = list(self.in_use.values())
        for served in wanted:
            if served.name not in replica.names:
                await self._give(replica, served)
            self.proofs.compare(replica, served, await self.score(replica, served), served.answers)
        for own in replica.names.keys() - {served.name for served in wanted}:
            await replica.unload(replica.names.pop(own))
        if set(wanted) == set(self.in_use.values()):
            replica.state, replica.trouble = "serving", ""

    async def _prove_path(self, replica: Replica, probe: KeptProbe) -> None:
        """Compare a server on the base, and with the loud adapter, with what the trainer computed."""
        served = self.named(probe.version)
        await self._give(replica, served)
        try:
            probe.witness.error(await self.score(replica, served), probe.witness.noise(await self.score(replica, None)))
        finally:
            await replica.forget(served)
