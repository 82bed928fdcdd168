"""The replicas in rotation: requests go to the least loaded, and what one cannot do another does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from lora_grpo.engines.server.client import Unreachable
from lora_grpo.engines.server.loop import arrived
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.engines.server.wire import completion_body, scoring_body, to_completion, to_logprobs
from lora_grpo.errors import EngineError, UnknownVersion
from lora_grpo.types import Completion, Sampling

_Result = TypeVar("_Result")

_PLACEMENTS = 4
"""Replicas that a request may lose, one after the other, before it counts as the reason."""

_SECOND_LOOK_S = 1.0
"""A look that failed once may have met a busy server; answers are not thrown away for that."""

Life: TypeAlias = tuple[Replica, str | None]
"""A replica and when its process started."""


@dataclass(frozen=True, eq=False)
class Ask(Generic[_Result]):
    """A request for a model, `body` but for its name; `served` is None for the base."""

    served: Served | None
    body: Callable[[str], dict[str, Any]]
    read: Callable[[dict[str, Any], dict[str, Any]], _Result]


def completing(
    served: Served | None, ids: Sequence[int], sampling: Sampling, seed: int, placeholders: Sequence[int]
) -> Ask[Completion]:
    number = None if served is None else served.version.number
    return Ask(
        served,
        lambda name: completion_body(name, ids, sampling, seed, placeholders),
        lambda answer, body: to_completion(answer, body, number),
    )


def scoring(served: Served | None, ids: Sequence[int]) -> Ask[list[float]]:
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
        answers: list[list[_Result]] = [[] for _ in groups]
        for (g, _), made in zip(parts, await self._vouched([part for _, part in parts], only), strict=True):
            answers[g] += made
        return answers

    async def _vouched(self, parts: Sequence[Sequence[Ask[_Result]]], only: Replica | None) -> list[list[_Result]]:
        """Each part's answers. Those that another life of a process may have given, which nothing had proven, are
        thrown away and asked for again."""
        done: dict[int, list[_Result]] = {}
        for _ in range(_PLACEMENTS):
            left = [index for index in range(len(parts)) if index not in done]
            made = await _together([self._finish(parts[index], only) for index in left])
            ended = await self._ended(set().union(*(lives for _, lives in made)))
            done |= {index: answers for index, (answers, lives) in zip(left, made, strict=True) if not lives & ended}
            if len(done) == len(parts):
                return [done[index] for index in range(len(parts))]
            if only is not None:
                break
        urls = ", ".join(sorted({replica.url for replica, _ in ended}))
        raise EngineError(
            f"{urls} restarted, or went away, each time before an answer could count; is each of them the address of "
            "one server?"
        )

    async def _ended(self, lives: set[Life]) -> set[Life]:
        """Those that are over, or cannot be asked."""
        over = await asyncio.gather(*(self._is_over(*life) for life in lives))
        return {life for life, is_over in zip(lives, over, strict=True) if is_over}

    async def _is_over(self, replica: Replica, life: str | None) -> bool:
        try:
            await replica.require_life(life)
        except EngineError:
            await asyncio.sleep(_SECOND_LOOK_S)
        else:
            return False
        try:
            await replica.require_life(life)
        except EngineError as error:
            if replica.facts.started == life:
                self._lost(replica, error)
            return True
        return False

    def notify(self) -> None:
        """Wake those that wait for a place: some replica has room now, came back or was given up."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _finish(self, asks: Sequence[Ask[_Result]], only: Replica | None) -> tuple[list[_Result], set[Life]]:
        """The answers, and the lives that have to be vouched for: of servers where names do not tell one from the
        next."""
        done: dict[int, _Result] = {}
        lives: set[Life] = set()
        failures: list[str] = []
        base = asks[0].served is None
        while len(done) < len(asks):
            left = [index for index in range(len(asks)) if index not in done]
            replica = await self._place(len(left), base, only)
            life = (replica, replica.facts.started)
            answers = await self._send(replica, [asks[index] for index in left])
            answered = {i: a for i, a in zip(left, answers, strict=True) if not isinstance(a, Unreachable)}
            if answered and (base or replica.pulls):
                lives.add(life)
            done |= answered
            failures += [str(answer) for answer in answers if isinstance(answer, Unreachable)][:1]
            if len(failures) == _PLACEMENTS or (failures and only is not None):
                raise EngineError(f"a request failed wherever it was sent: {'; '.join(failures)}")
        return [done[index] for index in range(len(asks))], lives

    async def _send(self, replica: Replica, asks: Sequence[Ask[_Result]]) -> list[_Result | Unreachable]:
        """What comes back from where the requests were entered; raises any failure that another replica would share."""
        try:
            answers = await asyncio.gather(*(self._one(replica, ask) for ask in asks), return_exceptions=True)
        finally:
            replica.in_flight -= len(asks)
            self.notify()
        kept: list[_Result | Unreachable] = []
        for answer in answers:
            if isinstance(answer, Unreachable):
                self._lost(replica, answer)
            elif isinstance(answer, BaseException):
                raise answer
            kept.append(answer)
        return kept

    async def _one(self, replica: Replica, ask: Ask[_Result]) -> _Result:
        name = replica.facts.base if ask.served is None else replica.names.get(ask.served.name)
        if name is None:
            raise UnknownVersion("a version was unloaded while it was being sampled from; unload it afterwards")
        body = ask.body(name)
        answer = ask.read(await replica.ask(body), body)
        arrived()
        return answer

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


async def _together(coroutines: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """All results; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _has_room(replica: Replica, count: int, base: bool, limit: int) -> bool:
    if replica.in_flight == 0:
        return True
    return replica.in_flight + count <= limit and (replica.mixes_base or replica.serves_base == base)
