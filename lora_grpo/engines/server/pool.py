"""The replicas in rotation: requests go to the least loaded, and what one cannot do another does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lora_grpo.engines.server.client import Unreachable
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.engines.server.wire import completion_body, scoring_body, to_completion, to_logprobs
from lora_grpo.errors import EngineError, UnknownVersion
from lora_grpo.types import Completion, Sampling

_Result = TypeVar("_Result")

_PLACEMENTS = 4
"""Replicas that a request may lose, one after the other, before it counts as the reason."""


@dataclass(frozen=True, eq=False)
class Ask(Generic[_Result]):
    """A request for a model, `body` but for its name; `served` is None for the base."""

    served: Served | None
    body: Callable[[str], dict[str, Any]]
    read: Callable[[dict[str, Any], dict[str, Any]], _Result]


def completing(served: Served | None, ids: Sequence[int], sampling: Sampling, seed: int) -> Ask[Completion]:
    """A request for one sample of a prompt."""
    number = None if served is None else served.version.number
    return Ask(
        served,
        lambda name: completion_body(name, ids, sampling, seed),
        lambda answer, body: to_completion(answer, body, number),
    )


def scoring(served: Served | None, ids: Sequence[int]) -> Ask[list[float]]:
    """A request for the log-probs of a sequence."""
    return Ask(served, lambda name: scoring_body(name, ids), to_logprobs)


class Pool:
    """Places requests. `limit` bounds those in flight on each replica; `lost` is told of a replica that failed."""

    def __init__(self, replicas: list[Replica], limit: int, lost: Callable[[Replica, Exception], None]) -> None:
        self.replicas, self._limit, self._lost = replicas, limit, lost
        self._changed = asyncio.Event()

    async def run(
        self, groups: Sequence[Sequence[Ask[_Result]]], *, only: Replica | None = None
    ) -> list[list[_Result]]:
        """The answers to each group's requests; the requests of a group, which share a prompt, stay together."""
        parts = [
            (g, group[start : start + self._limit])
            for g, group in enumerate(groups)
            for start in range(0, len(group), self._limit)
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [(g, tasks.create_task(self._finish(part, only))) for g, part in parts]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        answers: list[list[_Result]] = [[] for _ in groups]
        for g, task in running:
            answers[g] += task.result()
        return answers

    def notify(self) -> None:
        """Wake those that wait for a place: some replica has room now, came back or was given up."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _finish(self, asks: Sequence[Ask[_Result]], only: Replica | None) -> list[_Result]:
        done: dict[int, _Result] = {}
        failures: list[str] = []
        while len(done) < len(asks):
            left = [index for index in range(len(asks)) if index not in done]
            replica = await self._place(len(left), asks[0].served is None, only)
            try:
                answers = await asyncio.gather(*(self._one(replica, asks[i]) for i in left), return_exceptions=True)
            finally:
                self._give_back(replica, len(left))
            for index, answer in zip(left, answers, strict=True):
                if isinstance(answer, Unreachable):
                    self._lost(replica, answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    done[index] = answer
            failures += [str(answer) for answer in answers if isinstance(answer, Unreachable)][:1]
            if len(failures) == _PLACEMENTS or (failures and only is not None):
                raise EngineError(f"a request failed wherever it was sent: {'; '.join(failures)}")
        return [done[index] for index in range(len(asks))]

    async def _one(self, replica: Replica, ask: Ask[_Result]) -> _Result:
        name = replica.facts.base if ask.served is None else replica.names.get(ask.served.name)
        if name is None:
            raise UnknownVersion("a version was unloaded while it was being sampled from; unload it afterwards")
        body = ask.body(name)
        return ask.read(await replica.ask(body), body)

    async def _place(self, count: int, base: bool, only: Replica | None) -> Replica:
        """A replica with room for `count` requests, which are entered there; raises `EngineError` when none is left.

        What is asked of one replica `only` is a proof: few requests, which do not wait until a rollout has ended.
        """
        limit = self._limit if only is None else 2 * self._limit
        while True:
            candidates = self.replicas if only is None else [only]
            free = [r for r in candidates if r.state == "serving" and _has_room(r, count, base, limit)]
            if free:
                chosen = min(free, key=lambda replica: replica.in_flight)
                chosen.in_flight += count
                chosen.serves_base = base
                return chosen
            if all(replica.state == "lost" for replica in candidates):
                reasons = "; ".join(replica.trouble for replica in candidates)
                raise EngineError(f"no replica is left to answer: {reasons}")
            await self._changed.wait()

    def _give_back(self, replica: Replica, count: int) -> None:
        replica.in_flight -= count
        self.notify()


def _has_room(replica: Replica, count: int, base: bool, limit: int) -> bool:
    if replica.in_flight == 0:
        return True
    return replica.in_flight + count <= limit and (replica.mixes_base or replica.serves_base == base)
