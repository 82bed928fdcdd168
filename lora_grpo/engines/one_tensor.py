"""Layers that a checkpoint holds as one tensor, and an adapter too, where vLLM's class expects a tensor a slice."""

from __future__ import annotations

import importlib
from typing import Any

_WHOLE = {"Glm4ForCausalLM": ("gate_up_proj",)}


def take_whole() -> None:
    """From now on, in this process: vLLM takes adapters of these layers in the only form that PEFT writes.

    Its loader refuses their names otherwise. It serves the same layer of its other classes so (Phi-3, GLM-4V).
    """
    manager: Any = importlib.import_module("vllm.lora.model_manager")
    stock = getattr(manager, "process_packed_modules_mapping", None)
    if stock is None or hasattr(stock, "stock"):
        return

    def mapping(model: Any, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        return {**stock(model, *args, **kwargs), **{name: [name] for name in _WHOLE.get(type(model).__name__, ())}}

    mapping.stock = stock  # type: ignore[attr-defined]
    manager.process_packed_modules_mapping = mapping
