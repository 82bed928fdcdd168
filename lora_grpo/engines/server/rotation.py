"""The replicas in rotation: what one cannot do another does, and one that fails is out until it is back and proven."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lora_grpo.engines.server.client import COMPLETIONS, Missing, Unreachable
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import EngineError, LoraGrpoError, UnknownVersion
from lora_grpo.worker import working

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_PLACEMENTS = 4
"""Replicas that requests may lose, one after the other, before they count as the reason."""

FIRST_PAUSE_S = 0.25


@dataclass(frozen=True, eq=False)
class Ask(Generic[_Result]):
    """A request, `body` without the model's name; `served` is None for the base."""

    served: Served | None
    body: dict[str, Any]
    read: Callable[[dict[str, Any], dict[str, Any]], _Result]


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

    async def run(self, groups: Sequence[Sequence[Ask[_Result]]], *, only: Replica | None = None) -> list[_Result]:
        """All answers, in order; the requests of a group, which are for one version, are asked of one replica."""
        parts = [group[i : i + self.concurrency] for group in groups for i in range(0, len(group), self.concurrency)]
        made = await together([self._finish(part, only) for part in parts])
        return [answer for answers in made for answer in answers]

    async def _finish(self, asks: Sequence[Ask[_Result]], only: Replica | None) -> list[_Result]:
        served = asks[0].served
        failures: list[str] = []
        while len(failures) < (_PLACEMENTS if only is None else 1):
            replica = await self._place(len(asks), served is None, only)
            life = replica.facts.started
            try:
                answers = await together([self._one(replica, ask) for ask in asks])
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

    async def _one(self, replica: Replica, ask: Ask[_Result]) -> _Result:
        name = replica.facts.base if ask.served is None else replica.names.get(ask.served)
        if name is None:
            raise UnknownVersion("a version was unloaded while it was being sampled from; unload it afterwards")
        body = {"model": name, **ask.body}
        answer = ask.read(await replica.client.ask(COMPLETIONS, body), body)
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


async def together(coroutines: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """All results; the first failure ends the others. (A TaskGroup whose task just failed forgets its own cancel.)"""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _has_room(replica: Replica, count: int, base: bool, limit: int) -> bool:
    if replica.in_flight == 0 or replica.state != "serving":
        return True
    # vLLM's CPU kernels mix base and adapter rows of a batch up before 0.33, and no server says that it is on a CPU.
    mixes = replica.facts.release >= (0, 33) or replica.serves_base == base
    return mixes and replica.in_flight + count <= limit
