"""How a mixture of experts starts and is computed whose experts carry no LoRA."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch

from lora_grpo.engines.patching import replaced


def make_expert_group() -> None:
    """Let an engine with experts start beside one without: vLLM makes process groups with its first engine alone."""
    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    if not state.model_parallel_is_initialized() or state._EP is not None or torch.distributed.get_world_size() > 1:
        return
    world = state.get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    state._EP = state.init_model_parallel_group([world.ranks], world.local_rank, backend, group_name="ep")


def experts_without_lora() -> AbstractContextManager[None]:
    """Models that are built within compute their experts as an engine without LoRA does.

    With LoRA on, vLLM picks kernels that could add it to the experts, also where none is wrapped; there are none for
    the CPU.
    """
    layer = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    stock = layer.FusedMoEConfig
    return replaced(layer, FusedMoEConfig=lambda **settings: stock(**{**settings, "is_lora_enabled": False}))
