"""The optimizer and schedule that a policy uses when it is given none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lora_grpo.config import GRPOConfig
from lora_grpo.errors import ConfigError, UnsupportedAdapter

if TYPE_CHECKING:
    from torch.nn import Parameter


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The adapter's parameters by name; refuses a model that trains none, trains others, or trains them in bf16."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("the model has no trainable parameter: build it with peft.get_peft_model and a LoraConfig")
    for name, parameter in trainable.items():
        if "lora_" not in name:
            raise UnsupportedAdapter(f"{name} is trainable but no LoRA weight: only adapters are trained; freeze it")
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"adapter weight {name} is {parameter.dtype}: small updates would round to nothing; keep "
                "autocast_adapter_dtype=True in get_peft_model, or call .float() on the adapter's weights"
            )
    return trainable


def build_optimizer(model: nn.Module, config: GRPOConfig) -> AdamW:
    """AdamW over the adapter's parameters."""
    return AdamW(
        trainable_parameters(model).values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def build_scheduler(optimizer: Optimizer, config: GRPOConfig, num_updates: int) -> LRScheduler:
    """The schedule `config.lr_scheduler_type` over `num_updates` optimizer updates, one step an update."""
    from transformers import get_scheduler

    scheduler: LRScheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=num_updates,
    )
    return scheduler
