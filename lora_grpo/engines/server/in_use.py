"""The versions in use, and what replicas must answer for each: changed in the engine's loop, read from any thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.canary import MAX_BASE_NOISE_NATS, CanaryReport, Witness, compare
from lora_grpo.engines.loaded import LoadedVersions
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import ConfigError, DeliveryError
from lora_grpo.types import LogProbs

PROBE_STEP = -1
"""The step of the version that `run_probe` makes, which compares what it answers itself."""


@dataclass(frozen=True)
class KeptProbe:
    """The probe that replicas were proven with: files that stay, what a trainer computes with them, noise in nats."""

    served: Served
    witness: Witness
    noise: float


class InUse(LoadedVersions[Served]):
    """A version is known by its answers to `sequences`, and may be mistaken for any other that is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.probe: KeptProbe | None = None
        self.sequences: list[list[int]] = []

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion | None]) -> Iterator[list[Served | None]]:
        """The versions as they are served (None: the base), kept in use meanwhile and made the most recently used."""
        wanted = [None if version is None else self.find(version) for version in versions]
        distinct = list(dict.fromkeys(served for served in wanted if served is not None))
        for served in distinct:
            self.add(served)
            served.users += 1
        try:
            yield wanted
        finally:
            for served in distinct:
                served.users -= 1

    def require_expected(self, served: Served) -> None:
        """Raises `ConfigError` where a trainer has shown itself, and nobody says what it computes with this version."""
        if not served.answers and self.probe is not None and served.version.step != PROBE_STEP:
            raise ConfigError(
                f"{served.version} cannot be proven: replicas compared with one another may all be wrong alike. Load "
                "it by NativeSync (push, rollback), or pass expected= with the trainer's log-probs of the probe's "
                "sequences"
            )

    def compare(self, replica: Replica, served: Served, answers: LogProbs) -> CanaryReport:
        """Raises `DeliveryError` naming the replica when it answers otherwise than expected."""
        others, noise = [known.answers for known in self.all() if known is not served], MAX_BASE_NOISE_NATS
        if self.probe is not None:
            others, noise = [*others, self.probe.witness.base], self.probe.noise
        try:
            return compare(answers, served.answers, others, noise)
        except DeliveryError as error:
            raise DeliveryError(f"{replica.url} does not serve {served.version}: {error}") from None
