"""The native path with LoRA computed as plain matrix products over all slots, in place of vLLM's kernels."""

from __future__ import annotations

from typing import Any, ClassVar

from lora_grpo.bench.strategies.native import Native


class NativeGemm(Native):
    """As `Native`, with `plain_lora_gemm`."""

    summary: ClassVar[str] = "the same, LoRA as two plain products a layer"
    decodes_like: ClassVar[str] = "native-gemm"
    engine_options: ClassVar[dict[str, Any]] = {"plain_lora_gemm": True}
