"""As TRL merges, but only what LoRA touches is pushed."""

from __future__ import annotations

from typing import ClassVar

from lora_grpo.bench.strategies.base import Synced
from lora_grpo.bench.strategies.merging import Pushing, checkpoint_tensors
from lora_grpo.bench.timing import Clock


class MergeTouched(Pushing):
    """Every member of a touched fused layer goes along, biases too: a part of it would silently corrupt the rest."""

    summary: ClassVar[str] = "merge_adapter, push touched layers, unmerge_adapter"
    decodes_like: ClassVar[str] = "merge-trl"

    def start(self) -> None:
        super().start()
        self._touched = self.touched()

    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        with clock("merge"):
            self.trainer.model.merge_adapter()
        with clock("push"):
            named = checkpoint_tensors(self.trainer.model)
            self.push((name, tensor) for name, tensor in named if name.rpartition(".")[0] in self._touched)
        with clock("unmerge"):
            self.trainer.model.unmerge_adapter()
        with clock("cache reset"):
            self.engine.reset_prefix_cache()
        return Synced(clock.seconds, self.moved_bytes)
