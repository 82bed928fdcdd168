"""What a policy asks of its model: the mode it is in, what it computes with, how it is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_grpo.adapters.peft_form.modules import reshard
from lora_grpo.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model trains or evaluates meanwhile; a sharded one is given back in shards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        reshard(model)
        for module, mode in before:
            module.training = mode


def without_ddp(model: PeftModel) -> PeftModel:
    """The model inside DDP's wrapper, if it has one."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def drops_out(model: nn.Module) -> bool:
    """Whether anything is dropped out in training, by a layer or by a rate of the configuration."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    rates = [value for name, value in (text.to_dict() if text else {}).items() if "drop" in name]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def base_dtype(model: nn.Module) -> torch.dtype:
    """The frozen weights' dtype. Raises `ConfigError` for float16."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    dtype = next(frozen, torch.float32)
    if dtype == torch.float16:
        raise ConfigError("a float16 base loses small gradients without loss scaling: use bfloat16 or float32")
    return dtype


def check_sharding(accelerator: Accelerator | None) -> None:
    """Raises `ConfigError` for a way of sharding that is not DDP or FSDP2."""
    kind = str(accelerator.distributed_type.value) if accelerator else "NO"
    if kind in {"DEEPSPEED", "MEGATRON_LM"} or (kind == "FSDP" and accelerator and not accelerator.is_fsdp2):
        raise ConfigError(f"accelerate's {kind} is not supported: use plain DDP, or FSDP with fsdp_version: 2")
