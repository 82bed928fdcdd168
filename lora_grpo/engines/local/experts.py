"""How a mixture of experts is computed whose experts carry no LoRA."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def experts_without_lora(wanted: bool) -> Iterator[None]:
    """Models that are built within compute their experts as an engine without LoRA does.

    With LoRA on, vLLM picks kernels that could add it to the experts, also where none is wrapped; there are none for
    the CPU.
    """
    if not wanted:
        yield
        return
    layer: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    stock = layer.FusedMoEConfig

    layer.FusedMoEConfig = lambda **settings: stock(**{**settings, "is_lora_enabled": False})
    try:
        yield
    finally:
        layer.FusedMoEConfig = stock
