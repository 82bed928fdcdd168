"""No adapter at all: what decoding costs at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.base import Synced
from lora_grpo.bench.strategies.merging import Merging


class BaseOnly(Merging):
    """The base on an engine without LoRA; there is no trainer, and a sync does nothing."""

    summary: ClassVar[str] = "the base, no adapter"
    decodes_like: ClassVar[str] = "base"

    def prepare(self, subject: Subject, seen: Callable[[str], None]) -> None:
        self.subject = subject
        self.start()
        seen("engine")

    def renew(self) -> Synced:
        return self.sync()

    def sync(self) -> Synced:
        return Synced({}, {})

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        return base_OI
