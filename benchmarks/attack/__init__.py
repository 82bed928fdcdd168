"""Attacks on what a run leaves open: `python -m benchmarks.attack`."""

from __future__ import annotations

from dataclasses import dataclass, field

FOLDER = "lora-grpo-attack-"
"""How temporary folders begin."""


@dataclass
class Outcome:
    """`faults` has a sentence for each try that did not hold; `figures` have their units in their names."""

    attack: str
    tries: int = 0
    faults: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        self.tries += 1
        if not holds:
            self.faults.append(otherwise)
