"""Attacks on what a run leaves open: `python -m benchmarks.attack`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-attack-") as folder:
        yield Path(folder)


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
