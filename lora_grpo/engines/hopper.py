"""Hopper GPUs under vLLM before 0.33: the LoRA expand kernel, kept from the pipelining that is miscompiled there."""

from __future__ import annotations

import importlib
from typing import Any

from lora_grpo.errors import UnsupportedVersion

HOPPER = (9, 0)
MENDED_IN = (0, 33)
_KERNEL = "vllm.lora.ops.triton_ops.lora_expand_op"


def is_mended(kernel: Any = None) -> bool:
    """Whether `mend_kernels` has changed the kernel's launcher."""
    kernel = importlib.import_module(_KERNEL) if kernel is None else kernel
    return bool(getattr(getattr(kernel, "get_lora_op_configs", None), "one_stage", False))


def mend_kernels(release: tuple[int, int], capability: tuple[int, int] | None, kernel: Any = None) -> None:
    """Have vLLM's LoRA expand kernel run with one pipeline stage where two give NaN; nothing elsewhere.

    On Hopper the kernel of layers with one slice (o_proj, down_proj) is miscompiled with more (vllm#48590,
    triton#9433); vLLM 0.33 does the same by itself. The probe at the engine's start would find a NaN that is left.
    `kernel` is the module that holds the kernel's launcher, vLLM's own by default. Raises `UnsupportedVersion` where
    that is not what it was read to be.
    """
    if capability != HOPPER or release >= MENDED_IN:
        return
    kernel = importlib.import_module(_KERNEL) if kernel is None else kernel
    stock = getattr(kernel, "get_lora_op_configs", None)
    if is_mended(kernel):
        return
    if stock is None or not hasattr(kernel, "_lora_expand_kernel"):
        raise UnsupportedVersion(
            f"vLLM {release[0]}.{release[1]}'s LoRA kernel gives NaN on Hopper GPUs (vllm#48590) and cannot be set to "
            "one pipeline stage here: install 'vllm>=0.33,<0.34'"
        )

    def one_stage(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**stock(*args, **kwargs), "num_stages": 1}

    one_stage.one_stage = True  # type: ignore[attr-defined]
    kernel.get_lora_op_configs = one_stage
