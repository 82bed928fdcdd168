"""Lets go of an engine's weights, for the benchmark to see what they took. Nothing else uses this file."""

from __future__ import annotations

from typing import Any

from lora_grpo.engines import compat


def drop_weights(engine: Any) -> None:
    """Forget the base's weights of a `VLLMEngine` or `PlainEngine`, prepacked and shared ones too.

    The engine can only be closed afterwards.
    """
    # Each holds further references: the watch over shared weights, and the CPU backend's prepacked layers.
    vars(engine)["_shared"] = None
    for module in compat.runner(engine._llm).get_model().modules():
        module._parameters.clear()
        vars(module).pop("cpu_linear", None)
