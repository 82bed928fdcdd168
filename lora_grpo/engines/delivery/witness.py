"""What a trainer computes on fixed sequences, and how far an engine's answers may be from it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_grpo.errors import DeliveryError, UnsupportedAdapter
from lora_grpo.scoring import mean_abs_difference
from lora_grpo.types import LogProbs

AGREEMENT = 0.1
"""Share of that movement by which engine and trainer may differ; a scale wrong by 2 differs by about half."""
NOISES = 2.0
"""How many times the noise under the loud adapter they may differ besides, up to as much as `AGREEMENT` again."""
MAX_BASE_NOISE_NATS = 0.2


@dataclass(frozen=True)
class Witness:
    """What a trainer computes on fixed `sequences`, without an adapter (`base`) and with the loud one (`loud`), which
    moves the log-probs by `signal` nats a token; lists of log-probs of tokens 1..T-1. Rounding errors weigh `growth`
    times as much with the loud adapter as without."""

    sequences: list[list[int]]
    base: LogProbs
    loud: LogProbs
    signal: float
    growth: float = 1.0
    most_noise: float = MAX_BASE_NOISE_NATS

    def noise(self, served: LogProbs) -> float:
        """Nats by which an engine's base differs from the trainer's; raises `UnsupportedAdapter` for another base."""
        return base_noise(served, self.base, self.most_noise)

    def most_error(self, noise: float) -> float:
        """Nats by which an engine with the probe may differ, where its base differs by `noise`."""
        share = AGREEMENT * self.signal
        return share + min(NOISES * self.growth * noise, share)

    def error(self, served: LogProbs, noise: float) -> float:
        """Nats by which an engine with the probe differs from the trainer; raises `DeliveryError` for too many."""
        error, most = mean_abs_difference(served, self.loud), self.most_error(noise)
        if not error <= most:
            raise DeliveryError(
                f"the engine does not apply the adapter as the trainer does: log-probs differ by {error:.3g} nats "
                f"where the adapter moves them by {self.signal:.3g} (at most {most:.3g}; base noise {noise:.3g}); the "
                "path into vLLM is broken"
            )
        return error


def base_noise(served: LogProbs, trainer: LogProbs, most: float) -> float:
    noise = mean_abs_difference(served, trainer)
    if not noise <= most:
        raise UnsupportedAdapter(
            f"the bases of engine and trainer differ by {noise:.3g} nats a token, and rounding explains {most:.3g} at "
            "most: load both from the same checkpoint, in dtypes that the model supports, and let nothing else change "
            "what the trainer's modules compute (a hook, attention's scaling)"
        )
    return noise
