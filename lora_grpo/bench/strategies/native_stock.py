"""The native path as it decodes on vLLM's own CPU LoRA kernels: what ours are worth."""

from __future__ import annotations

from typing import Any, ClassVar

from lora_grpo.bench.strategies.native import Native


class NativeStock(Native):
    """As `Native`, with our CPU kernels switched off."""

    summary: ClassVar[str] = "the same, vLLM's own CPU LoRA kernels"
    decodes_like: ClassVar[str] = "native-stock"
    engine_options: ClassVar[dict[str, Any]] = {"cpu_lora_kernels": False}
