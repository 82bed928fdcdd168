"""What a run is started with: what its adapter needs of the engine, and whether all of it fits in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.adapters.peft_form.quantized import scheme_of
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines.compat import allowed_rank
from lora_grpo.engines.local.targets import check_whole
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.modes import base_dtype
from lora_grpo.trainer.activations import LargestBatch
from lora_grpo.trainer.memory import MemoryEstimate, available_memory, cache_bytes, estimate_memory, require_memory
from lora_grpo.trainer.models import (
    Sharing,
    adapted_leaves,
    checkpoint_of,
    default_device,
    expects_one_copy,
    lora_rank,
    without_memory,
)
from lora_grpo.trainer.own_base import quantization_of


@dataclass(frozen=True)
class Plan:
    """What a run's own engine is started for: adapters of `rank` on `leaves` (None: all linear layers)."""

    rank: int
    leaves: list[str] | None
    memory: MemoryEstimate
    checkpointing: bool
    """Whether the trainer computes activations twice."""


def plan(
    model: ModelConfig | nn.Module,
    peft_config: Any,
    config: EngineConfig,
    sharing: Sharing,
    batch: LargestBatch,
    checkpointing: bool | None,
) -> Plan:
    """The plan of a run. Raises `ConfigError` for a base or an adapter that cannot be, or too little memory."""
    check_whole(checkpoint_of(model).name)
    rank, leaves = lora_rank(model, peft_config), adapted_leaves(model, peft_config)
    if not config.urls:
        allowed_rank(max(rank, config.max_lora_rank or 0))
    if quantization_of(checkpoint_of(model)) is not None and sharing is True:
        raise ConfigError("share_base_weights=True: the engine's quantized weights are not the trainer's; leave it out")
    one_copy = expects_one_copy(sharing, model, config)
    memory, checkpointing = planned_memory(model, peft_config, config, batch, checkpointing, shared_base=one_copy)
    return Plan(rank, leaves, memory, checkpointing)


def planned_memory(
    model: ModelConfig | nn.Module,
    peft_config: Any,
    config: EngineConfig | None,
    batch: LargestBatch,
    checkpointing: bool | None,
    *,
    shared_base: bool = False,
) -> tuple[MemoryEstimate, bool]:
    """A run's estimate, and whether its activations are checkpointed; None: where they would not fit otherwise.

    Without a `config` the engine is there already. Raises `ConfigError` when the estimate does not fit.
    """
    device = default_device()
    available_bytes = available_memory(device)
    needed = estimate(model, peft_config, config, batch, shared_base, bool(checkpointing))
    if checkpointing is None and needed.total_bytes > available_bytes:
        checkpointing = True
        needed = estimate(model, peft_config, config, batch, shared_base, checkpointing)
    require_memory(needed, available_bytes, str(device))
    return needed, bool(checkpointing)


def checkpoints(
    model: ModelConfig | nn.Module, peft_config: Any, batch: LargestBatch, checkpointing: bool | None
) -> bool:
    """As `planned_memory`, where the engine is there already."""
    if checkpointing is None and isinstance(model, nn.Module):
        checkpointing = None if isinstance(peft_model_of(model).get_base_model(), PreTrainedModel) else False
    if checkpointing is None:
        _, checkpointing = planned_memory(model, peft_config, None, batch, None)
    return checkpointing


def estimate(
    model: ModelConfig | nn.Module,
    peft_config: Any,
    config: EngineConfig | None,
    batch: LargestBatch,
    shared_base: bool,
    checkpointing: bool,
) -> MemoryEstimate:
    """What `planned_memory` compares with what is there."""
    own = EngineConfig() if config is None else config
    empty = without_memory(model, peft_config)
    needed = estimate_memory(
        empty,
        batch,
        checkpointing=checkpointing,
        slots=own.max_loras,
        max_lora_rank=own.max_lora_rank or lora_rank(model, peft_config),
        trainer_dtype=_trainer_dtype(model, empty),
        engine_dtype=torch.bfloat16 if own.dtype == "auto" else getattr(torch, own.dtype),
        shared_base=shared_base or isinstance(model, nn.Module),
        scheme=quantization_of(checkpoint_of(model)) if isinstance(model, ModelConfig) else scheme_of(empty.config),
    )
    if config is None or config.urls:
        return replace(needed, engine_base_bytes=0, adapter_slots_bytes=0)
    kv_bytes = cache_bytes(default_device(), config.gpu_memory_utilization)
    if default_device().type == "cuda":
        kv_bytes = max(0, kv_bytes - needed.engine_base_bytes - needed.adapter_slots_bytes)
    return replace(needed, kv_bytes=kv_bytes)


def _trainer_dtype(model: ModelConfig | nn.Module, empty: Any) -> torch.dtype:
    if isinstance(model, nn.Module):
        return base_dtype(model)
    dtype: torch.dtype = getattr(torch, model.dtype, None) or empty.config.dtype or torch.float32
    return dtype
