"""Versions on all replicas or on none."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import LoadedVersions, Witness
from lora_grpo.engines.delivery.agreement import MAX_BASE_NOISE_NATS, CanaryReport, base_noise, compare, probe_error
from lora_grpo.engines.names import BaseReading
from lora_grpo.engines.server.client import Client, Result, Unreachable, together
from lora_grpo.engines.server.replica import Names, Replica, Served, connect, models
from lora_grpo.engines.server.rotation import FIRST_PAUSE_S, Asks, Rotation
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, LoraGrpoError
from lora_grpo.types import LogProbs


async def connected(clients: Sequence[Client], names: Names) -> list[Replica]:
    """Check every server, and have them forget what dead runs left there."""
    facts = await asyncio.gather(*(connect(client, names.rank_folder) for client in clients))
    replicas = [Replica(*pair) for pair in zip(clients, facts, strict=True)]
    if other := next((one for one in replicas if one.facts.model != facts[0].model), None):
        said = f"{other.url} serves {other.facts.model}, {clients[0].url} {facts[0].model}"
        raise ConfigError(f"{said}; start all replicas alike")
    for replica in replicas:
        for name in filter(names.is_leftover, await models(replica.client)):
            await replica.unload(name)
    return replicas


@dataclass(eq=False)
class Fleet(Rotation):
    """Where it `drops`, a replica that fails a load leaves the rotation, and others serve the version. What is in use
    is told apart by its answers to `sequences`. `probe` is what replicas were proven with; its noise is in nats."""

    names: Names
    max_loras: int
    drops: bool
    sequences: list[list[int]]
    probe: tuple[Served, Witness, float] | None = field(default=None, init=False)
    in_use: LoadedVersions[Served] = field(default_factory=LoadedVersions, init=False)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def answer(self, asks: Asks[AdapterVersion | None, Result], **how: Any) -> list[Result]:
        """`run` with versions (None: the base), which are kept in use meanwhile and made the most recently used."""
        groups = [(None if version is None else self.in_use.find(version), own) for version, own in asks]
        distinct = dict.fromkeys(served for served, _ in groups if served is not None)
        for served in distinct:
            self.in_use.add(served)
            served.users += 1
        try:
            return await self.run(groups, **how)
        finally:
            for served in distinct:
                served.users -= 1

    async def load(self, served: Served) -> CanaryReport | None:
        """Put a version into use on every replica, proven, or on none; one in use is proven again, and taken out of use
        if a replica that may not be dropped answers otherwise. No verdict where nobody said what it must answer. Raises
        `DeliveryError` or `EngineError` naming each that failed, `ConfigError` for nothing expected despite a probe."""
        async with self._changing:
            known = self.in_use.known(served.version)
            # The step of a probe is below 0, and `run_probe` itself compares what it answers.
            if known is None and not served.answers and self.probe is not None and served.version.step >= 0:
                how = "load it by NativeSync, or pass expected= (the trainer's log-probs of the probe's sequences)"
                raise ConfigError(f"{served.version} cannot be proven: replicas that agree may be wrong alike; {how}")
            served = known or served
            try:
                verdict = await self._prove(served)
            except BaseException as error:
                if known is None or isinstance(error, DeliveryError):
                    await self._drop(served)
                raise
            self.in_use.add(served)
            for replica in self.replicas:
                if served not in replica.names:
                    self.lost(replica, EngineError(f"{replica.url} has yet to load {served.version}"))
            # Beyond what the slots hold, the least recently used go; never one that is being used.
            every = self.in_use.all()
            idle = [one for one in every if not one.users and one is not served]
            for oldest in idle[: max(0, len(every) - self.max_loras)]:
                await self._drop(oldest)
            return verdict

    async def unload(self, served: Served) -> None:
        async with self._changing:
            await self._drop(served)

    async def close(self) -> None:
        """Have the servers forget this engine's versions; those that do not answer forget them when they restart."""
        for served in self.in_use.all():
            await self._drop(served)
        await asyncio.gather(*(replica.client.close() for replica in self.replicas))

    async def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        """What each server reads of its base; remembered, for when it comes back."""
        serving = self.serving
        read = await asyncio.gather(*(replica.read_base(shapes) for replica in serving))
        for replica, own in zip(serving, read, strict=True):
            replica.base_read = shapes, own
        return [one for own in read for one in own]

    # Loading

    async def _present(self) -> list[Replica]:
        """The replicas that a load must reach: those in rotation, the others waited for unless they may be dropped."""
        await asyncio.gather(*(self._or_lost(replica, replica.look()) for replica in self.serving))
        for replica in self.replicas:
            if replica.state == "lost":
                self.bring_back(replica)
        if not self.drops:
            await asyncio.gather(*(self.returned(replica) for replica in self.replicas))
        present = self.serving
        absent = [replica.trouble for replica in self.replicas if replica.state != "serving"]
        if absent and (not self.drops or not present):
            said = f"{len(absent)} of {len(self.replicas)} replicas cannot take a version"
            raise EngineError(f"{said}: {'; '.join(absent)}")
        return present

    async def _or_lost(self, replica: Replica, doing: Awaitable[None]) -> None:
        try:
            await doing
        except EngineError as error:
            self.lost(replica, error)

    async def _prove(self, served: Served) -> CanaryReport | None:
        replicas = await self._present()
        outcomes = await together([self._take(replica, served) for replica in replicas])
        failed = {r: o for r, o in zip(replicas, outcomes, strict=True) if isinstance(o, LoraGrpoError)}
        proven = {r: o for r, o in zip(replicas, outcomes, strict=True) if not isinstance(o, LoraGrpoError)}
        if failed and (not self.drops or not proven):
            kind = DeliveryError if any(isinstance(o, DeliveryError) for o in failed.values()) else EngineError
            listed = "; ".join(f"{replica.url}: {error}" for replica, error in failed.items())
            raise kind(f"{served.version} failed on {len(failed)} of {len(replicas)} replicas: {listed}")
        for replica, error in failed.items():
            self.lost(replica, EngineError(f"{replica.url} failed to prove {served.version}: {error}"))
        (first, answers), *_ = proven.items()
        if served.answers:
            return self._compare(first, served, answers)
        served.answers = answers
        for replica, others in proven.items():
            self._compare(replica, served, others)
        return None

    async def _take(self, replica: Replica, served: Served) -> LogProbs | LoraGrpoError:
        """Load a version on one replica and score it, with retries. One in use is not loaded again: that it answers
        otherwise than before has to be heard of, and whoever samples from it needs its name."""
        known, pause_s, attempts = served in self.in_use.all(), FIRST_PAUSE_S, 3
        while True:
            try:
                answers = await self._scored(replica, served)
                if served.answers:
                    self._compare(replica, served, answers)
                return answers
            except LoraGrpoError as error:
                if isinstance(error, Unreachable):
                    self.lost(replica, error)
                dropped = replica.state != "serving" and self.drops
                attempts -= 1
                if not attempts or dropped or (known and isinstance(error, DeliveryError)):
                    return error
            if not known:
                await self._forget(replica, served)
            await asyncio.sleep(pause_s)
            pause_s *= 2
            await self.returned(replica)

    def _compare(self, replica: Replica, served: Served, answers: LogProbs) -> CanaryReport:
        others, noise = [known.answers for known in self.in_use.all() if known is not served], MAX_BASE_NOISE_NATS
        if self.probe is not None:
            _, witness, noise = self.probe
            others.append(witness.base)
        try:
            return compare(answers, served.answers, others, noise)
        except DeliveryError as error:
            raise DeliveryError(f"{replica.url} does not serve {served.version}: {error}") from None

    async def _scored(self, replica: Replica, served: Served | None) -> LogProbs:
        """Of the probe's sequences, by one replica, which is given the version if it lacks it."""
        if served is not None and served not in replica.names:
            # By a name that was never used, or the one that it is pulled by.
            name = served.pulled_as or self.names.fresh(served.version)
            await (replica.pull(name) if served.pulled_as else replica.load(served.version, name))
            replica.names[served] = name
        return await self.run([(served, [partial(Client.score, ids=ids) for ids in self.sequences])], only=replica)

    async def _forget(self, replica: Replica, served: Served) -> None:
        """Unload a version from a replica, if it can be reached; where not, it loses its names or is asked for them."""
        if replica.state == "serving":
            await self._or_lost(replica, replica.forget(served))

    async def _drop(self, served: Served) -> None:
        self.in_use.remove(served)
        await asyncio.gather(*(self._forget(replica, served) for replica in self.replicas))

    # Coming back

    async def readmit(self, replica: Replica) -> bool:
        """Check a server, probe it and prove everything in use on it; False where more came into use meanwhile."""
        await replica.reconnect(self.names.rank_folder)
        await replica.require_same_base()
        if self.probe is not None:
            # On the base, and with the loud adapter, it is compared with what the trainer computed.
            loud, witness, _ = self.probe
            noise = base_noise(await self._scored(replica, None), witness.base, witness.most_noise)
            answers = await self._scored(replica, loud)
            # Not in a `finally`: a server that is gone would raise there, and hide that the time to wait is over.
            await replica.forget(loud)
            probe_error(answers, witness, noise)
        wanted = self.in_use.all()
        for served in wanted:
            try:
                self._compare(replica, served, await self._scored(replica, served))
            except DeliveryError:
                # What answers otherwise under this name will do so the next time.
                await replica.forget(served)
                raise
        for served in replica.names.keys() - set(wanted):
            await replica.forget(served)
        return set(wanted) == set(self.in_use.all())
