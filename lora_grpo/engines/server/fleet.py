"""Versions on all replicas or on none."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_grpo.engines.delivery.canary import CanaryReport
from lora_grpo.engines.names import BaseReading
from lora_grpo.engines.server.client import Client, Unreachable
from lora_grpo.engines.server.connect import connect, models
from lora_grpo.engines.server.names import Names
from lora_grpo.engines.server.replica import InUse, KeptProbe, Replica, Served
from lora_grpo.engines.server.rotation import FIRST_PAUSE_S, Rotation, scoring, together
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, LoraGrpoError
from lora_grpo.types import LogProbs

_LOAD_ATTEMPTS = 3


async def connected(clients: Sequence[Client], names: Names, rank_folder: Path | None) -> list[Replica]:
    """Check every server, and have them forget what dead runs left there."""
    facts = await asyncio.gather(*(connect(client, rank_folder) for client in clients))
    replicas = [Replica(*pair) for pair in zip(clients, facts, strict=True)]
    for replica in replicas:
        if replica.facts.model != facts[0].model:
            said = f"{replica.url} serves {replica.facts.model}, {clients[0].url} {facts[0].model}"
            raise ConfigError(f"{said}; start all replicas alike")
    for replica in replicas:
        for name in filter(names.is_leftover, await models(replica.client)):
            await replica.unload(name)
    names.sweep()
    return replicas


@dataclass(eq=False)
class Fleet(Rotation):
    """`rank_folder` is as in `connect`; where it `drops`, a replica that fails a load leaves the rotation, and others
    serve the version."""

    names: Names
    rank_folder: Path | None
    max_loras: int
    drops: bool
    in_use: InUse = field(default_factory=InUse, init=False)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def load(self, served: Served) -> CanaryReport | None:
        """Put a version into use on every replica, proven, or on none; one that is in use is proven again, and no
        longer is where a replica that may not be dropped answers otherwise.

        Where nobody has said what it must answer, the replicas are compared with one another only, and there is no
        verdict. Raises `DeliveryError` or `EngineError` naming each replica that failed, and `ConfigError` where
        nothing is expected although a probe is kept.
        """
        async with self._changing:
            known = self.in_use.known(served.version)
            if known is None:
                self.in_use.require_expected(served)
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
            await self._retire(served)
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
        await asyncio.gather(*(self._look(replica) for replica in self.serving))
        for replica in self.replicas:
            if replica.state == "lost":
                self.bring_back(replica)
        if not self.drops:
            await asyncio.gather(*(self.returned(replica) for replica in self.replicas))
        present = self.serving
        absent = [replica for replica in self.replicas if replica.state != "serving"]
        if absent and (not self.drops or not present):
            reasons = "; ".join(replica.trouble for replica in absent)
            raise EngineError(f"{len(absent)} of {len(self.replicas)} replicas cannot take a version: {reasons}")
        return present

    async def _look(self, replica: Replica) -> None:
        try:
            await replica.look()
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
            return self.in_use.compare(first, served, answers)
        served.answers = answers
        for replica, others in proven.items():
            self.in_use.compare(replica, served, others)
        return None

    async def _take(self, replica: Replica, served: Served) -> LogProbs | LoraGrpoError:
        """Load a version on one replica and score it; tried again after a pause, on a replica that came back too.

        One that is in use is not loaded again: that it answers otherwise than before has to be heard of, and whoever
        samples from it needs its name.
        """
        known, pause_s, attempts = served in self.in_use.all(), FIRST_PAUSE_S, _LOAD_ATTEMPTS
        while True:
            try:
                answers = await self._scored(replica, served)
                if served.answers:
                    self.in_use.compare(replica, served, answers)
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

    async def _scored(self, replica: Replica, served: Served | None) -> LogProbs:
        """What one replica, which is given the version if it lacks it, answers to the probe's sequences."""
        if served is not None:
            await self._give(replica, served)
        return await self.run([[scoring(served, ids) for ids in self.in_use.sequences]], only=replica)

    async def _give(self, replica: Replica, served: Served) -> None:
        """Have a server take a version, unless it has it: by a name that was never used, or the one it is pulled by."""
        if served in replica.names:
            return
        if served.pulled_as is not None:
            name = served.pulled_as
            await replica.pull(name)
        else:
            name = self.names.fresh(served.version)
            await replica.load(served.version, name)
        replica.names[served] = name

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
        for served in idle[: max(0, len(every) - self.max_loras)]:
            await self._drop(served)

    # Coming back

    async def readmit(self, replica: Replica) -> bool:
        """Check and probe a server that answers again, and prove everything in use on it; False where more came into
        use meanwhile."""
        await replica.reconnect(self.rank_folder)
        await replica.require_same_base()
        if self.in_use.probe is not None:
            await self._prove_path(replica, self.in_use.probe)
        wanted = self.in_use.all()
        for served in wanted:
            try:
                self.in_use.compare(replica, served, await self._scored(replica, served))
            except DeliveryError:
                # What answers otherwise under this name will do so the next time.
                await replica.forget(served)
                raise
        for served in replica.names.keys() - set(wanted):
            await replica.forget(served)
        return set(wanted) == set(self.in_use.all())

    async def _prove_path(self, replica: Replica, probe: KeptProbe) -> None:
        """Compare a server on the base, and with the loud adapter, with what the trainer computed."""
        base = await self._scored(replica, None)
        loud = await self._scored(replica, probe.served)
        # Not in a `finally`: a server that is gone would raise there, and hide that the time to wait is over.
        await replica.forget(probe.served)
        probe.witness.error(loud, probe.witness.noise(base))
