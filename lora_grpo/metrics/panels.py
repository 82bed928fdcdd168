"""The curves that tell how a run went, for its picture and its page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lora_grpo.metrics.log import Record
from lora_grpo.metrics.render import GAP, PHASES, SIGNAL

Points: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""
SMOOTHING = 0.7


@dataclass(frozen=True)
class Panel:
    """Lines by name. `crop`: a slow first step (warm-up) does not flatten the others."""

    title: str
    lines: dict[str, Points]
    crop: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value to show; 0 is always shown."""
        low, high = (
            edge(0.0, *(value for _, values in self.lines.values() for value in values)) for edge in (min, max)
        )
        if self.crop:
            high = min(high, 3 * max(statistics.median(values) for _, values in self.lines.values())) or high
        return low, high


def panels(records: Sequence[Record], given_up: Sequence[Record] = ()) -> list[Panel]:
    """Of the run as it counts; the steps that a rollback or a resume went back before are a line of their own."""
    steps = [record for record in records if record["event"] == "step"]
    at, rewards = series(steps, "reward")
    evaluations = [record for record in records if record["event"] == "evaluation"]
    made = [
        Panel(
            "Reward of the sampled completions",
            {"each step": (at, rewards), "smoothed": (at, smoothed(rewards)), "given up": series(given_up, "reward")},
        ),
        Panel("Held-out reward", {"reward": series(evaluations, "reward")}),
        Panel("Log-prob gap, trainer to sampler, nats a token", {"gap": series(steps, GAP)}),
        Panel("Share of groups whose rewards differ", {"signal": series(steps, SIGNAL)}),
        Panel("Length of completions, tokens", {"mean": series(steps, "completions/mean_length")}),
        Panel("Seconds a step", {phase: series(steps, f"time/{phase}_s") for phase in PHASES}, crop=True),
    ]
    there = [(panel, {name: line for name, line in panel.lines.items() if line[0]}) for panel in made]
    return [Panel(panel.title, lines, panel.crop) for panel, lines in there if lines]


def marks(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Steps at which a run went back or its canary failed, and why."""
    failed = [(r["step"], "canary failed") for r in records if r.get("canary/verdict") == "failed"]
    return sorted(failed + [(r["step"], str(r["text"])) for r in records if r["event"] == "rollback"])


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values where the metric is there and finite."""
    found = [(record["step"], float(record[name])) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, debiased, so that it starts at the first value."""
    smooth: list[float] = []
    total = weight = 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(total / weight)
    return smooth
