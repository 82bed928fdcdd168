"""The strongest merge there can be: A and B alone travel, and the engine folds them into its own weights."""

from __future__ import annotations

from typing import ClassVar

import torch

from lora_grpo.bench.strategies.base import Synced
from lora_grpo.bench.strategies.merge_trl import MergeTRL
from lora_grpo.bench.strategies.merging import Merging
from lora_grpo.bench.timing import Clock


class MergeFold(Merging):
    """W0 + s B A from a pristine W0 straight into the (fused) weights that the engine computes with.

    No renaming, no unmerging, no drift; but a second copy of the base in the engine, and the bf16 grid. On the CPU the
    engine's weights can only be written to unprepacked, which it computes slower with.
    """

    summary: ClassVar[str] = "engine folds A and B into its weights from a pristine copy"
    decodes_like: ClassVar[str] = "merge-fold"
    prepack = False

    def start(self) -> None:
        super().start()
        weights = self.engine.linear_weights()
        self._folds = [(module, weights[module.path]) for module in self.trainer.modules]
        self._pristine = [weight.clone() for _, weight in self._folds]

    @property
    def decodes_here_like(self) -> str:
        # Nothing is prepacked on a GPU: merged weights are merged weights.
        return self.decodes_like if self.subject.device == "cpu" else MergeTRL.decodes_like

    @torch.no_grad()
    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        with clock("merge"):
            for (module, weight), pristine in zip(self._folds, self._pristine, strict=True):
                a_RI, b_OR = module.a_RI.to(weight.dtype), (module.b_OR * module.scaling).to(weight.dtype)
                torch.addmm(pristine, b_OR, a_RI, out=weight)
        with clock("cache reset"):
            self.engine.reset_prefix_cache()
        elements = self.trainer.adapter_elements
        # Trainer and engine share the device: A and B cross its memory once.
        return Synced(clock.seconds, {self.channel: elements * 2})

    def drop_base(self) -> None:
        self._folds.clear()
        self._pristine.clear()
        super().drop_base()

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        return next(weight for module, weight in self._folds if module.path == path).float()
