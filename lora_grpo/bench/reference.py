"""The policy in fp32 on plain weights: an oracle that shares no code with PEFT's forward, vLLM or any merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_grpo.bench.strategies.trainer import Trainer
from lora_grpo.scoring import teacher_logprobs

NewWeight: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]
"""(checkpoint path, base weight in fp32) -> the weight to compute with."""


class Reference:
    """A checkpoint in fp32 whose linear weights can be replaced for a while."""

    def __init__(self, model: str, device: str) -> None:
        # The checkpoint's own dtype crosses to the device: half of what fp32 would.
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).float().eval()
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
    def weights(self, paths: Collection[str], new: NewWeight) -> Iterator[None]:
        """Meanwhile, what is computed with at `paths` is what `new` makes of the base's weights, in each forward pass.

        The base stays where it is, and no more than one new weight is there at a time: a GPU holds one model in fp32,
        and nothing crosses to the host.
        """
        replaced = [self._modules[path] for path in paths]
        for path, module in zip(paths, replaced, strict=True):
            module.forward = partial(_linear, module, path, new)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward

    @contextmanager
    def policy(self, trainer: Trainer) -> Iterator[None]:
        """Meanwhile, the base plus the trainer's adapter as it is now, summed in fp32."""
        modules = {module.path: module for module in trainer.modules}
        with self.weights(modules, lambda path, base_OI: base_OI + trainer.update_of(modules[path])):
            yield


def _linear(module: nn.Linear, path: str, new: NewWeight, x: torch.Tensor) -> torch.Tensor:
    weight_OI = new(path, module.weight.detach().float())
    return nn.functional.linear(x, weight_OI.to(x), module.bias)
