"""The canary: do the log-probs that completions were sampled with fit the version they are stamped with?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import DeliveryError

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
