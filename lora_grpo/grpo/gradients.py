"""Gradients over all processes: their sum, its norm, and clipping, for adapters held whole and for sharded ones.

The losses' normalisers have divided by all rows already, so gradients are added, never averaged. Whole ones are added
by hand and not by DDP, so that processes may differ in how many rows they compute; FSDP2 adds those that it sharded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lora_grpo.adapters.peft_form.modules import whole
from lora_grpo.grpo.processes import Processes


class Gradients:
    """Of one model's trainable parameters."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        self._parameters = list(parameters)
        self._processes = processes
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._sharded:
            module.set_gradient_divide_factor(1.0)
            # Without it, a factor of 1 is a reduction that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the model: each forward and backward is then one of all processes."""
        return bool(self._sharded)

    def zero(self) -> None:
        """Zeros, not None: a step in which no row moves the policy is still one for Adam's moments, everywhere."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def add_up_with(self, last: bool) -> None:
        """FSDP2 adds over the processes once an update, with its `last` backward."""
        for module in self._sharded:
            module.set_requires_gradient_sync(last, recurse=False)

    def add_up(self) -> float:
        """Sums what FSDP2 has not summed; the norm of the sum."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        sharded: list[Tensor] = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        if plain and self._processes.count > 1:
            flat = self._processes.sum(torch.cat([gradient.flatten() for gradient in plain]))
            for gradient, part in zip(plain, flat.split([g.numel() for g in plain]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norms = [whole(get_total_norm(kind)) for kind in (plain, sharded) if kind]
        return get_total_norm(norms).item() if len(norms) > 1 else norms[0].item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale all of them as a gradient of `norm` has to be to have at most `max_norm` (0: any)."""
        if max_norm:
            total = torch.tensor(norm, device=self._parameters[0].device)
            clip_grads_with_norm_(self._parameters, max_norm, total)
