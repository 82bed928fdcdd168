"""Do log-probs fit the version they are said to be of? The canary of a batch, and the proof by behaviour of a load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import DeliveryError
from lora_grpo.scoring import mean_abs_difference
from lora_grpo.types import LogProbs

Verdict: TypeAlias = Literal["ok", "failed", "inconclusive"]

RESOLUTION = 5.0
"""Differences within this many times the noise say nothing."""


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
            f"canary {self.verdict}: trainer and sampler differ by {self.gap:.4f} nats a token where the adapter moves "
            f"them by {self.signal:.4f} (noise {self.noise:.4f}, {self.tokens} tokens)"
        )


def judge(gap: float, signal: float, noise: float) -> Verdict:
    """The verdict on a gap.

    A sampler that ignores the adapter has gap = signal. So the gap fails when it is above the noise and as large as
    half the signal; it passes when the signal is large enough to have shown that. Anything else is inconclusive, NaN
    fails.
    """
    if math.isnan(gap + signal + noise) or gap > max(RESOLUTION * noise, 0.5 * signal):
        return "failed"
    return "ok" if signal > RESOLUTION * noise and gap <= 0.5 * signal else "inconclusive"


def compare(served: LogProbs, expected: LogProbs, others: Sequence[LogProbs], noise: float) -> CanaryReport:
    """Whether log-probs `served` are the `expected` ones and none of the `others`; raises `DeliveryError` when not.

    The signal is the distance to the nearest of the others: "ok" has told the version from each of them. `noise` is
    in nats a token, as everywhere.
    """
    gap = mean_abs_difference(served, expected)
    signal = min((mean_abs_difference(expected, other) for other in others), default=0.0)
    report = CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, served)))
    if report.verdict == "failed":
        raise DeliveryError(
            f"log-probs are {gap:.4f} nats a token from the expected ones, where the nearest other version is "
            f"{signal:.4f} away (noise {noise:.4f})"
        )
    return report
