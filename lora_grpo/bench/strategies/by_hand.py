"""What a user writes without this project: PEFT's `save_pretrained`, vLLM's `add_lora`, nothing proven."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from lora_grpo.bench.strategies.base import Strategy, Synced, engine_arguments
from lora_grpo.bench.timing import Clock, adapter_crossing
from lora_grpo.engines.local.weights import PlainEngine

KEPT = 8


class ByHand(Strategy):
    """A fresh directory on tmpfs, id and name each time; old directories are removed after the clock stopped."""

    def start(self) -> None:
        self.engine = PlainEngine(self.subject.model, lora_rank=self.subject.rank, **engine_arguments(self.subject))
        self._count = 0
        self._request: Any = None

    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        self._count += 1
        path = self.folder / str(self._count)
        with clock("write"):
            self.trainer.model.save_pretrained(path)
        with clock("load"):
            self._request = self.engine.load_adapter(path)
        shutil.rmtree(self.folder / str(self._count - KEPT), ignore_errors=True)
        # PEFT writes the adapter as it is trained, in fp32; at least that much crosses.
        return Synced(clock.seconds, adapter_crossing(self.subject.device, 4 * self.trainer.adapter_elements))

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        a_RI, b_OR = self.engine.lora_tensors(path)
        return base_OI + (b_OR.float() @ a_RI.float()).to(base_OI.device)

    def rollback_cases(self) -> dict[str, int]:
        return {"evicted": KEPT - 2}

    def mark(self) -> tuple[Any, list[torch.Tensor]]:
        return self._request, self.trainer.snapshot()

    def rollback(self, mark: tuple[Any, list[torch.Tensor]]) -> Synced:
        request, weights = mark
        clock = Clock(self.subject.device)
        with clock("load"):
            self.engine.serve(request)
        with clock("trainer"):
            self.trainer.restore(weights)
        return Synced(clock.seconds, {})

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)
