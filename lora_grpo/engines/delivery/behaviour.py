"""The proof by behaviour: what an engine that cannot be looked into answers, against what the trainer computes."""

from __future__ import annotations

from collections.abc import Sequence

from lora_grpo.engines.delivery.canary import CanaryReport, judge
from lora_grpo.errors import DeliveryError
from lora_grpo.scoring import mean_abs_difference


def compare(
    served: list[list[float]], expected: list[list[float]], others: Sequence[list[list[float]]], noise: float
) -> CanaryReport:
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
