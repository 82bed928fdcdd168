"""The policy in fp32 on plain weights: an oracle that shares no code with PEFT's forward, vLLM or any merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM

from lora_grpo.bench.strategies.trainer import Trainer
from lora_grpo.scoring import teacher_logprobs

NewWeight: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]
"""(checkpoint path, base weight in fp32) -> the weight to compute with."""


class Reference:
    """A checkpoint in fp32 whose linear weights can be replaced for a while."""

    def __init__(self, model: str, device: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        self._modules = dict(self._model.named_modules())

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs of tokens 1..T-1."""
        return teacher_logprobs(self._model, sequences)

    def rounded_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The same of the same weights, computed in bf16 throughout; the reference cannot be used afterwards."""
        return teacher_logprobs(self._model.to(torch.bfloat16), sequences)

    def weight(self, path: str) -> torch.Tensor:
        """The base's weight at a checkpoint path, fp32."""
        weight: torch.Tensor = self._modules[path].weight.detach()
        return weight

    def restore_base(self, trainer: Trainer) -> None:
        """Make the trainer's frozen base what the checkpoint says, whatever merging has left of it."""
        for module in trainer.modules:
            trainer.base_weight(module).copy_(self.weight(module.path))

    @contextmanager
    def weights(self, paths: Iterable[str], new: NewWeight) -> Iterator[None]:
        """Meanwhile, the weights at `paths` are what `new` makes of the base's."""
        # What is replaced waits in the host's memory: a GPU holds one model in fp32, not two.
        replaced: dict[str, torch.Tensor] = {}
        try:
            for path in paths:
                base_OI = self._modules[path].weight.data
                replaced[path] = base_OI.cpu()
                self._modules[path].weight.data = new(path, base_OI).to(base_OI)
            yield
        finally:
            for path, saved_OI in replaced.items():
                self._modules[path].weight.data = saved_OI.to(self._modules[path].weight.device)

    @contextmanager
    def policy(self, trainer: Trainer) -> Iterator[None]:
        """Meanwhile, the base plus the trainer's adapter as it is now, summed in fp32."""
        modules = {module.path: module for module in trainer.modules}
        with self.weights(modules, lambda path, base_OI: base_OI + trainer.update_of(modules[path])):
            yield
