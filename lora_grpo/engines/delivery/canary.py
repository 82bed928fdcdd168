"""Do log-probs fit the version they are said to be of: a batch's, a load's, and the probe's at the start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import DeliveryError, UnsupportedAdapter
from lora_grpo.scoring import mean_abs_difference
from lora_grpo.types import LogProbs

Verdict: TypeAlias = Literal["ok", "failed", "inconclusive"]

RESOLUTION = 5.0
"""Differences within this many times the noise say nothing."""
AGREEMENT = 0.1
"""Share of the loud adapter's movement by which engine and trainer may differ; a scale wrong by 2 differs by half."""
NOISES = 2.0
"""How many times the noise under the loud adapter they may differ besides, up to as much as `AGREEMENT` again."""
MAX_BASE_NOISE_NATS = 0.2


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """Nats, means over completion tokens: `gap` trainer against sampler, `signal` the trainer's adapter against its
    base, `noise` engine against trainer on the base, over the same completions."""

    verdict: Verdict
    gap: float
    signal: float
    noise: float
    tokens: int

    def check(self, version: AdapterVersion) -> None:
        """Raises `DeliveryError` where the completions cannot be those of `version`."""
        if self.verdict == "failed":
            raise DeliveryError(f"{self}: the completions were not made by {version}")

    def __str__(self) -> str:
        return (
            f"canary {self.verdict}: trainer and sampler differ by {self.gap:.4f} nats per token, while the adapter "
            f"moves them by {self.signal:.4f} (noise {self.noise:.4f}, {self.tokens} tokens)"
        )


def judge(gap: float, signal: float, noise: float) -> Verdict:
    """A sampler that ignores the adapter has gap = signal. So the gap fails when it is above the noise and as large as
    half the signal; it passes when the signal is large enough to have shown that. Anything else is inconclusive, NaN
    fails."""
    if math.isnan(gap + signal + noise) or gap > max(RESOLUTION * noise, 0.5 * signal):
        return "failed"
    return "ok" if signal > RESOLUTION * noise and gap <= 0.5 * signal else "inconclusive"


def compare(served: LogProbs, expected: LogProbs, others: Sequence[LogProbs], noise: float) -> CanaryReport:
    """Whether log-probs `served` are the `expected` ones and none of the `others`; raises `DeliveryError` when not. The
    signal is the distance to the nearest of the others: "ok" has told the version from each of them."""
    gap = mean_abs_difference(served, expected)
    signal = min((mean_abs_difference(expected, other) for other in others), default=0.0)
    report = CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, served)))
    if report.verdict == "failed":
        raise DeliveryError(
            f"log-probs are {gap:.4f} nats per token from the expected ones; the nearest other version is "
            f"{signal:.4f} away (noise {noise:.4f})"
        )
    return report


@dataclass(frozen=True)
class Witness:
    """What a trainer computes on fixed `sequences`, without an adapter (`base`) and with the loud one (`loud`), which
    moves the log-probs by `signal` nats per token; lists of log-probs of tokens 1..T-1. Rounding errors weigh `growth`
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
                f"where the adapter moves them by {self.signal:.3g} (at most {most:.3g}; base noise {noise:.3g})"
            )
        return error


def base_noise(served: LogProbs, trainer: LogProbs, most: float) -> float:
    noise = mean_abs_difference(served, trainer)
    if not noise <= most:
        raise UnsupportedAdapter(
            f"the bases of engine and trainer differ by {noise:.3g} nats per token, but rounding explains {most:.3g} "
            "at most: load both from one checkpoint, in a dtype that it supports, without hooks or another attention"
        )
    return noise
