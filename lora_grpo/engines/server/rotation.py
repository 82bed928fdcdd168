"""The replicas in rotation: what one cannot do another does, and one that fails is out until it is back and proven."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from lora_grpo.engines.server.client import Client, Missing, Result, Unreachable, together
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import EngineError, LoraGrpoError, UnknownVersion
from lora_grpo.worker import working

logger = logging.getLogger(__name__)

_Version = TypeVar("_Version")

FIRST_PAUSE_S = 0.25


Ask: TypeAlias = Callable[[Client, str], Awaitable[Result]]
"""What is asked of a server, of a model by the name that it has there."""
Asks: TypeAlias = Sequence[tuple[_Version, Sequence[Ask[Result]]]]
"""Requests by version (None: the base)."""


@dataclass(eq=False)
class Rotation(ABC):
    """The replicas of one engine, in rotation or on their way back. Every method runs in the engine's loop.
    `concurrency` bounds the requests on each replica, `patience_s` the time that one is waited for."""

    replicas: list[Replica]
    concurrency: int
    patience_s: float
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @abstractmethod
    async def readmit(self, replica: Replica) -> bool:
        """Prove one that answers again; called again where it raises `LoraGrpoError`, and at once where it is False."""

    @property
    def serving(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "serving"]

    # Out of rotation, and back

    def lost(self, replica: Replica, error: Exception) -> None:
        if replica.state == "serving":
            replica.trouble = str(error)
            logger.warning("%s; this server is out of use, waited for up to %g s", error, self.patience_s)
            self.bring_back(replica)

    def bring_back(self, replica: Replica) -> None:
        """Begin to; nobody else does, so however it ends, those who wait for that hear of it."""
        replica.returning = asyncio.create_task(self._return(replica))
        replica.returning.add_done_callback(lambda _: self._notify())

    async def returned(self, replica: Replica) -> None:
        """Wait until a replica that is away came back or was given up; raises what nobody foresaw on the way."""
        if replica.returning is not None:
            await asyncio.shield(replica.returning)

    async def _return(self, replica: Replica) -> None:
        pause_s, before = FIRST_PAUSE_S, replica.trouble
        try:
            async with asyncio.timeout(self.patience_s):
                while replica.state == "away":
                    try:
                        if await self.readmit(replica):
                            replica.returning, replica.trouble = None, ""
                            logger.warning("%s is back and proven", replica.url)
                    except LoraGrpoError as error:
                        replica.trouble = str(error)
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, 5.0)
        except TimeoutError:
            given_up = f" (not back within patience_s={self.patience_s:g} s)"
            replica.trouble = replica.trouble.removesuffix(given_up) + given_up
            if replica.trouble != before:  # each load tries again, perhaps for thousands of steps
                logger.warning("%s", replica.trouble)
        except Exception as error:
            replica.trouble = f"{replica.url} could not be brought back: {error!r}"
            raise

    def _notify(self) -> None:
        """Wake those that wait for a place: some replica has room now, came back or was given up."""
        self._changed.set()
        self._changed = asyncio.Event()

    # Requests

    async def run(self, asked: Asks[Served | None, Result], size: int = 0, only: Replica | None = None) -> list[Result]:
        """All answers, in order; of a version's, one replica makes `size` together, or as many as it has room for."""
        size = min(size or self.concurrency, self.concurrency)
        parts = [(served, asks[i : i + size]) for served, asks in asked for i in range(0, len(asks), size)]
        made = await together([self._finish(part, only) for part in parts])
        return [answer for answers in made for answer in answers]

    async def _finish(self, part: tuple[Served | None, Sequence[Ask[Result]]], only: Replica | None) -> list[Result]:
        (served, asks), failures = part, list[str]()
        # Requests that lose four replicas, one after the other, count as the reason.
        while len(failures) < (4 if only is None else 1):
            replica = await self._place(len(asks), served is None, only)
            life = replica.facts.started
            try:
                answers = await together([self._one(replica, served, ask) for ask in asks])
                if served is None or served.pulled_as is not None:
                    # Another life of the server, which nothing has proven, would answer to this name too.
                    await replica.require_life(life)
                return answers
            except (Unreachable, Missing) as error:
                if replica.facts.started == life:
                    self.lost(replica, error)
                failures.append(str(error))
            finally:
                replica.in_flight -= len(asks)
                self._notify()
        raise EngineError(f"a request failed wherever it was sent: {'; '.join(failures)}")

    async def _one(self, replica: Replica, served: Served | None, ask: Ask[Result]) -> Result:
        name = replica.facts.base if served is None else replica.names.get(served)
        if name is None:
            raise UnknownVersion("a version was unloaded while it was being sampled from; unload it afterwards")
        answer = await ask(replica.client, name)
        if (worker := working.get()) is not None:
            worker.lives()
        return answer

    async def _place(self, count: int, base: bool, only: Replica | None) -> Replica:
        """A replica with room for `count` requests, which are entered there; `EngineError` when none is left. What is
        asked of one replica `only` is a proof: few requests, which do not wait until a rollout has ended. One that is
        away has room: nothing that it answers counts until it is proven, and this may be what brings it back."""
        limit = self.concurrency if only is None else 2 * self.concurrency
        while True:
            free = [r for r in ([only] if only else self.serving) if _has_room(r, count, base, limit)]
            if free:
                chosen = min(free, key=lambda replica: replica.in_flight)
                if not chosen.in_flight:
                    chosen.serves_base = base
                chosen.in_flight += count
                return chosen
            if all(replica.state == "lost" for replica in self.replicas):
                raise EngineError(f"no replica is left to answer: {'; '.join(one.trouble for one in self.replicas)}")
            await self._changed.wait()


def _has_room(replica: Replica, count: int, base: bool, limit: int) -> bool:
    if replica.in_flight == 0 or replica.state != "serving":
        return True
    # vLLM's CPU kernels mix base and adapter rows of a batch up before 0.33, and no server says that it is on a CPU.
    return (replica.facts.release >= (0, 33) or replica.serves_base == base) and replica.in_flight + count <= limit
