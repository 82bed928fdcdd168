"""Versions on all replicas or on none."""

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lora_grpo.adapters.files.places import Identity
from lora_grpo.adapters.version import AdapterVersion, run_name, served_name
from lora_grpo.engines.base import LoadedVersions
from lora_grpo.engines.delivery.canary import MAX_BASE_NOISE_NATS, CanaryReport, Witness, base_noise, compare
from lora_grpo.engines.names import BaseReading
from lora_grpo.engines.server.client import Client, Unreachable, scoring_body, to_logprobs
from lora_grpo.engines.server.replica import Names, Replica, Served, connect, models
from lora_grpo.engines.server.rotation import FIRST_PAUSE_S, Ask, Rotation, together
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, LoraGrpoError
from lora_grpo.types import LogProbs


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
    serve the version. One in use is known by its answers to `sequences`, and may be mistaken for any other in use.
    `probe` is what replicas were proven with: files that stay, what a trainer computes with them, noise in nats."""

    names: Names
    rank_folder: Path | None
    max_loras: int
    drops: bool
    sequences: list[list[int]]
    probe: tuple[Served, Witness, float] | None = field(default=None, init=False)
    in_use: LoadedVersions[Served] = field(default_factory=LoadedVersions, init=False)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion | None]) -> Iterator[list[Served | None]]:
        """The versions as they are served (None: the base), kept in use meanwhile and made the most recently used."""
        wanted = [None if version is None else self.in_use.find(version) for version in versions]
        distinct = list(dict.fromkeys(served for served in wanted if served is not None))
        for served in distinct:
            self.in_use.add(served)
            served.users += 1
        try:
            yield wanted
        finally:
            for served in distinct:
                served.users -= 1

    async def load(self, served: Served) -> CanaryReport | None:
        """Put a version into use on every replica, proven, or on none; one in use is proven again, and no longer is
        where a replica that may not be dropped answers otherwise. There is no verdict where nobody has said what it
        must answer, and replicas are compared with one another only. Raises `DeliveryError` or `EngineError` naming
        each replica that failed, `ConfigError` where nothing is expected although a probe is kept."""
        async with self._changing:
            known = self.in_use.known(served.version)
            # The step of a probe is below 0, and `run_probe` itself compares what it answers.
            if known is None and not served.answers and self.probe is not None and served.version.step >= 0:
                why = "replicas that agree with one another may all be wrong alike"
                how = "load it by NativeSync, or pass expected= (the trainer's log-probs of the probe's sequences)"
                raise ConfigError(f"{served.version} cannot be proven, since {why}; {how}")
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
        await asyncio.gather(*(self._or_lost(replica, replica.look()) for replica in self.serving))
        for replica in self.replicas:
            if replica.state == "lost":
                self.bring_back(replica)
        if not self.drops:
            await asyncio.gather(*(self.returned(replica) for replica in self.replicas))
        present = self.serving
        absent = [replica.trouble for replica in self.replicas if replica.state != "serving"]
        if absent and (not self.drops or not present):
            listed = "; ".join(absent)
            raise EngineError(f"{len(absent)} of {len(self.replicas)} replicas cannot take a version: {listed}")
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
        """Raises `DeliveryError` naming the replica when it answers otherwise than expected."""
        others, noise = [known.answers for known in self.in_use.all() if known is not served], MAX_BASE_NOISE_NATS
        if self.probe is not None:
            _, witness, noise = self.probe
            others.append(witness.base)
        try:
            return compare(answers, served.answers, others, noise)
        except DeliveryError as error:
            raise DeliveryError(f"{replica.url} does not serve {served.version}: {error}") from None

    async def _scored(self, replica: Replica, served: Served | None) -> LogProbs:
        """What one replica, which is given the version if it lacks it, answers to the probe's sequences."""
        if served is not None and served not in replica.names:
            # By a name that was never used, or the one that it is pulled by.
            if (name := served.pulled_as) is not None:
                await replica.pull(name)
            else:
                name = self.names.fresh(served.version)
                await replica.load(served.version, name)
            replica.names[served] = name
        return await self.run([[Ask(served, scoring_body(ids), to_logprobs) for ids in self.sequences]], only=replica)

    async def _forget(self, replica: Replica, served: Served) -> None:
        """Unload a version from a replica, if it can be reached; where not, it loses its names or is asked for them."""
        if replica.state == "serving":
            await self._or_lost(replica, replica.forget(served))

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
        """Check a server, probe it and prove everything in use on it; False where more came into use meanwhile."""
        await replica.reconnect(self.rank_folder)
        await replica.require_same_base()
        if self.probe is not None:
            # On the base, and with the loud adapter, it is compared with what the trainer computed.
            loud, witness, _ = self.probe
            noise = base_noise(await self._scored(replica, None), witness.base, witness.most_noise)
            answers = await self._scored(replica, loud)
            # Not in a `finally`: a server that is gone would raise there, and hide that the time to wait is over.
            await replica.forget(loud)
            witness.error(answers, noise)
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


def resolver_name(version: AdapterVersion) -> str:
    """The name, RUN@NUMBER, by which a resolver finds a published version. Raises `ConfigError` for one of no store."""
    root = version.path.parent.parent
    if (identity := Identity.read(root)) is None:
        raise ConfigError(f"{version} at {version.path} is in no store, so no resolver can pull it; publish it first")
    return served_name(run_name(Path(identity.other or root), identity.run_id), version.number)
