"""The versions in use, and what replicas must answer for each: changed in the engine's loop, read from any thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.canary import CanaryReport, compare
from lora_grpo.engines.delivery.witness import MAX_BASE_NOISE_NATS, Witness
from lora_grpo.engines.requests import find_loaded, loaded_from_its_path
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import ConfigError, DeliveryError


class InUse:
    """By path, least recently used first."""

    def __init__(self) -> None:
        # Replaced and never changed: who reads it in another thread has one state of it, and misses no version.
        self._by_path: dict[Path, Served] = {}

    def all(self) -> tuple[Served, ...]:
        return tuple(self._by_path.values())

    def known(self, version: AdapterVersion) -> Served | None:
        """As `loaded_from_its_path`."""
        return loaded_from_its_path(self._by_path, version)

    def find(self, version: AdapterVersion) -> Served:
        """As `find_loaded`."""
        return find_loaded(self._by_path, version)

    def add(self, served: Served) -> None:
        """As the most recently used; one that is there already becomes it."""
        self._by_path = {**self._without(served), served.version.path: served}

    def remove(self, served: Served) -> None:
        self._by_path = self._without(served)

    def _without(self, served: Served) -> dict[Path, Served]:
        return {path: known for path, known in self._by_path.items() if path != served.version.path}

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion | None]) -> Iterator[list[Served | None]]:
        """The versions as they are served (None: the base), kept in use meanwhile and made the most recently used.

        Raises `UnknownVersion` for one that is not loaded.
        """
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


Answers = list[list[float]]

PROBE_STEP = -1
"""The step of the version that `run_probe` makes, which compares what it answers itself."""


@dataclass(frozen=True)
class KeptProbe:
    """The probe that replicas were proven with: files that stay, what a trainer computes with them, noise in nats."""

    version: AdapterVersion
    witness: Witness
    noise: float


class Proofs:
    """Judges answers to `sequences`; a version may be mistaken for any of those in use."""

    def __init__(self, in_use: InUse) -> None:
        self.probe: KeptProbe | None = None
        self.sequences: list[list[int]] = []
        self._in_use = in_use

    def require_expected(self, version: AdapterVersion, expected: Answers | None) -> None:
        """Raises `ConfigError` where a trainer has shown itself, and nobody says what it computes with `version`."""
        if expected is None and self.probe is not None and version.step != PROBE_STEP:
            raise ConfigError(
                f"{version} cannot be proven: replicas compared with one another may all be wrong alike. Load it by "
                "NativeSync (push, rollback), or pass expected= with the trainer's log-probs of the probe's sequences"
            )

    def compare(self, replica: Replica, served: Served, answers: Answers, expected: Answers) -> CanaryReport:
        """Raises `DeliveryError` naming the replica when it answers otherwise than expected."""
        others = [known.answers for known in self._in_use.all() if known is not served]
        if self.probe is not None:
            others.append(self.probe.witness.base)
        try:
            return compare(answers, expected, others, self._noise)
        except DeliveryError as error:
            raise DeliveryError(f"{replica.url} does not serve {served.version}: {error}") from None

    @property
    def _noise(self) -> float:
        """Nats between servers and trainer on the base; before the probe, what is allowed at most."""
        return MAX_BASE_NOISE_NATS if self.probe is None else self.probe.noise
