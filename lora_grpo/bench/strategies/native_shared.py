"""The native path with one copy of the base: the trainer's model is made of views into the engine's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.native import Native
from lora_grpo.bench.strategies.trainer import Trainer


class NativeShared(Native):
    """As `Native`; on the CPU the engine computes with weights that are not prepacked."""

    summary: ClassVar[str] = "the same, one copy of the base for trainer and engine"
    decodes_like: ClassVar[str] = "native-shared"
    engine_options: ClassVar[dict[str, Any]] = {"share_base_weights": True}

    def prepare(self, subject: Subject, seen: Callable[[str], None]) -> None:
        self.subject = subject
        self.start_engine()
        seen("engine")
        self.trainer = Trainer(subject, self.engine.shared_model())
        seen("trainer")
        self.connect()
        seen("engine")
