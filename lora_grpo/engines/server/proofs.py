"""What replicas must answer: the trainer's log-probs, and each version's own from when it was proven."""

from __future__ import annotations

from dataclasses import dataclass

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.behaviour import compare
from lora_grpo.engines.delivery.canary import CanaryReport
from lora_grpo.engines.delivery.witness import MAX_BASE_NOISE_NATS, Witness
from lora_grpo.engines.server.in_use import InUse
from lora_grpo.engines.server.replica import Replica, Served
from lora_grpo.errors import ConfigError, DeliveryError

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
