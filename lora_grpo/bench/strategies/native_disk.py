"""The native path with its versions on an ordinary disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.native import Native


class NativeDisk(Native):
    """As `Native`, off tmpfs: what tmpfs is worth."""

    summary: ClassVar[str] = "the same, versions on a disk"

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().start()

    def folder(self, subject: Subject) -> Path:
        return Path(subject.disk) / "versions"
