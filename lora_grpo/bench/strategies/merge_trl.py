"""What TRL's GRPOTrainer does: merge in place, push every weight under its checkpoint name, unmerge."""

from __future__ import annotations

from typing import ClassVar

from lora_grpo.bench.strategies.base import Synced
from lora_grpo.bench.strategies.merging import Pushing, checkpoint_tensors
from lora_grpo.bench.timing import Clock


class MergeTRL(Pushing):
    """One tensor at a time into vLLM's `load_weights`; on the CPU, whose prepacked weights refuse that, all through
    `reload_weights`."""

    summary: ClassVar[str] = "merge_adapter, push every weight, unmerge_adapter"
    decodes_like: ClassVar[str] = "merge-trl"

    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        with clock("merge"):
            self.trainer.model.merge_adapter()
        with clock("push"):
            self.push(checkpoint_tensors(self.trainer.model))
        with clock("unmerge"):
            self.trainer.model.unmerge_adapter()
        with clock("cache reset"):
            self.engine.reset_prefix_cache()
        return Synced(clock.seconds, self.moved_bytes)
