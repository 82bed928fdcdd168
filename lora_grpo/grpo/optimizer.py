"""What an update takes: gradients over all processes, and the optimizer and schedule of a policy that is given none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lora_grpo.adapters.peft_form.modules import whole
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The adapter's parameters by name; refuses a model that trains none, trains others, or trains them in bf16."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("the model has no trainable parameter: build it with peft.get_peft_model and a LoraConfig")
    for name, parameter in trainable.items():
        if "lora_" not in name:
            raise UnsupportedAdapter(f"{name} is trainable but not a LoRA weight: only adapters are trained; freeze it")
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"adapter weight {name} is {parameter.dtype}: small updates would round to nothing; keep "
                "autocast_adapter_dtype=True in get_peft_model, or call .float() on the adapter's weights"
            )
    return trainable


def build_optimizer(model: nn.Module, config: GRPOConfig) -> AdamW:
    return AdamW(trainable_parameters(model).values(), **_settings(config))


def _settings(config: GRPOConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }


def apply_settings(optimizer: Optimizer, scheduler: Any, config: GRPOConfig, learning_rate_scale: float) -> None:
    """Have `config` say what a restored state said: the settings of AdamW, and the learning rate of a `LambdaLR`
    schedule, times `learning_rate_scale`, where its count of updates stands. Moments and counts stay.
    """
    highest = config.learning_rate * learning_rate_scale
    rates = [highest * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(_settings(config) | {"lr": rate, "initial_lr": highest})
    scheduler.base_lrs, scheduler._last_lr = [highest] * len(rates), rates


def build_scheduler(optimizer: Optimizer, config: GRPOConfig, num_updates: int) -> LRScheduler:
    """The schedule `config.lr_scheduler_type` over `num_updates` optimizer updates, one step an update."""
    scheduler: LRScheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_updates
    )
    return scheduler


def plain_optimizer(optimizer: Optimizer | None, parameters: Mapping[str, Parameter]) -> Optimizer | None:
    """torch's own optimizer, also of an accelerate wrapper; refuses one that would leave `parameters` as they are."""
    if optimizer is None:
        return None
    plain: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    held = {id(parameter) for group in plain.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise ConfigError(f"the optimizer does not hold {name}: build it on this model's trainable parameters")
    return plain


class Gradients:
    """Of one model's trainable parameters: their sum over all processes, its norm, and clipping.

    The losses' normalisers have divided by all rows already, so gradients are added, never averaged. Those of adapters
    held whole are added by hand and not by DDP, so that processes may differ in how many rows they compute; FSDP2 adds
    those that it sharded.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        self._parameters = list(parameters)
        self._processes = processes
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        """What FSDP2 holds of the model: if anything, each forward and backward is one of all processes."""
        for module in self.sharded:
            module.set_gradient_divide_factor(1.0)
            # Without it, a factor of 1 is a reduction that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)

    def zero(self) -> None:
        """Zeros, not None: a step in which no row moves the policy is still one for Adam's moments, everywhere."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def add_up_with(self, last: bool) -> None:
        """FSDP2 adds over the processes once an update, with its `last` backward."""
        for module in self.sharded:
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
