"""The optimizer and schedule that a policy uses when it is given none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.grpo_config import GRPOConfig

if TYPE_CHECKING:
    from torch.nn import Parameter


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
    from transformers import get_scheduler

    scheduler: LRScheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_updates
    )
    return scheduler


def plain_optimizer(optimizer: Optimizer | None, parameters: Mapping[str, Parameter]) -> Optimizer | None:
    """torch's own optimizer, also of an accelerate wrapper; refuses one that would leave `parameters` as they are."""
    if optimizer is None:
        return None
    from accelerate.optimizer import AcceleratedOptimizer

    plain: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    held = {id(parameter) for group in plain.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise ConfigError(f"the optimizer does not hold {name}: build it on this model's trainable parameters")
    return plain
