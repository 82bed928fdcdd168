"""W + s B A made tensor by tensor while streaming: the trainer's base is never written to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from lora_grpo.bench.strategies.base import Synced
from lora_grpo.bench.strategies.merging import Pushing, checkpoint_tensors
from lora_grpo.bench.timing import Clock


class MergeOutOfPlace(Pushing):
    """Touched layers only (the others do not change); the sum is formed in fp32 and rounded once."""

    summary: ClassVar[str] = "W + s B A while streaming touched layers; base untouched"
    decodes_like: ClassVar[str] = "merge-trl"

    def start(self) -> None:
        super().start()
        self._module_of = {f"{module.path}.weight": module for module in self.trainer.modules}
        self._touched = self.touched()

    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        with clock("push"):
            self.push(self._merged())
        with clock("cache reset"):
            self.engine.reset_prefix_cache()
        return Synced(clock.seconds, self.moved_bytes)

    @torch.no_grad()
    def _merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint_tensors(self.trainer.model):
            if name.rpartition(".")[0] not in self._touched:
                continue
            module = self._module_of.get(name)
            yield name, tensor if module is None else (tensor + self.trainer.update_of(module)).to(tensor.dtype)
