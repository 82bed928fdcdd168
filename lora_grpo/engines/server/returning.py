"""Replicas that fall out of rotation, and come back proven or are given up in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.server.in_use import InUse, KeptProbe, Proofs
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import DeliveryError, LoraGrpoError

FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0


class Returning:
    """Takes replicas out of rotation and puts them back. `changed` is told of each that came back or was given up.

    `named` gives the probe a name; `rank_folder` is as in `connect`.
    """

    def __init__(
        self,
        in_use: InUse,
        proofs: Proofs,
        named: Callable[[AdapterVersion], Served],
        rank_folder: Path | None,
        patience_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._in_use, self._proofs, self._named = in_use, proofs, named
        self._rank_folder, self._patience_s, self._changed = rank_folder, patience_s, changed

    def lost(self, replica: Replica, error: Exception) -> None:
        if replica.state == "serving":
            replica.trouble = str(error)
            self.begin(replica)

    def begin(self, replica: Replica) -> None:
        replica.state = "away"
        replica.returning = asyncio.create_task(self._wait_for(replica))
        replica.returning.add_done_callback(partial(self._ended, replica))
        self._changed()

    async def end(self, replica: Replica) -> None:
        """Wait until a replica that is away came back or was given up; raises what nobody foresaw on the way."""
        if replica.state == "away" and replica.returning is not None:
            await asyncio.shield(replica.returning)

    def _ended(self, replica: Replica, task: asyncio.Task[None]) -> None:
        """Nobody but the task brings a replica back: however it ended, those who wait for that have to hear of it."""
        if replica.returning is not task:
            return
        if not task.cancelled() and (error := task.exception()) is not None:
            replica.trouble = f"{replica.url} could not be brought back: {error!r}"
        if replica.state == "away":
            replica.state = "lost"
        self._changed()

    async def _wait_for(self, replica: Replica) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._patience_s):
                while replica.state == "away":
                    try:
                        await self._readmit(replica)
                    except LoraGrpoError as error:
                        replica.trouble = str(error)
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            replica.trouble += f" (not back within patience_s={self._patience_s:g} s)"

    async def _readmit(self, replica: Replica) -> None:
        """Put a server that answers again back into rotation: checked, probed, with everything in use, proven."""
        await replica.reconnect(self._rank_folder)
        await replica.require_same_base()
        if self._proofs.probe is not None:
            await self._prove_path(replica, self._proofs.probe)
        wanted = self._in_use.all()
        for served in wanted:
            await self._prove(replica, served)
        for own in replica.names.keys() - {served.name for served in wanted}:
            await replica.unload(replica.names.pop(own))
        if set(wanted) == set(self._in_use.all()):
            replica.state, replica.trouble = "serving", ""

    async def _prove(self, replica: Replica, served: Served) -> None:
        if served.name not in replica.names:
            await replica.give(served)
        try:
            answers = await replica.score(replica.names[served.name], self._proofs.sequences)
            self._proofs.compare(replica, served, answers, served.answers)
        except DeliveryError:
            # What answers otherwise under this name will do so the next time.
            await replica.forget(served)
            raise

    async def _prove_path(self, replica: Replica, probe: KeptProbe) -> None:
        """Compare a server on the base, and with the loud adapter, with what the trainer computed."""
        served, sequences = self._named(probe.version), self._proofs.sequences
        # Not in a `finally`: a server that is gone would raise there, and hide that the time to wait is over.
        await replica.give(served)
        base = await replica.score(replica.facts.base, sequences)
        loud = await replica.score(replica.names[served.name], sequences)
        await replica.forget(served)
        probe.witness.error(loud, probe.witness.noise(base))
