"""The native path with one copy of the base: the trainer's model is made of views into the engine's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.merging import checkpoint_name
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

    def same_bits(self) -> bool | None:
        from safetensors.torch import load_file

        own = {checkpoint_name(name): parameter.detach() for name, parameter in self.trainer.model.named_parameters()}
        files = sorted(Path(self.subject.model).glob("*.safetensors"))
        pairs = ((own[name], saved) for file in files for name, saved in load_file(file, self.subject.device).items())
        return all(torch.equal(mine, saved) for mine, saved in pairs) if files else None
