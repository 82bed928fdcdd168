"""What vLLM does on the CPU, but not with LoRA: compile a model, and compute a mixture's experts.

Its own LoRA path cannot be traced. Ours is one operator to the compiler.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lora_grpo.engines.patching import replaced
from lora_grpo.kernels.building import library


def can_compile() -> bool:
    """Whether there is what compiled code is built with, and where vLLM keeps it; a warning says what is missing."""
    if library() is None:
        return False  # and said why
    obstacle = _obstacle()
    if obstacle is not None:
        warnings.warn(
            f"models with LoRA are not compiled on this CPU, so decoding is slower: {obstacle}",
            RuntimeWarning,
            stacklevel=4,
        )
    return obstacle is None


def _obstacle() -> str | None:
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from vllm import envs

    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing; install them (python3-dev)"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"PyTorch finds no program that is called {config.cpp.cxx[-1]!r}; have CXX name one, without arguments"
    cache = Path(envs.VLLM_CACHE_ROOT)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"vLLM cannot keep compiled code in {cache} ({error.strerror}); set VLLM_CACHE_ROOT"
    return None if os.access(cache, os.W_OK) else f"vLLM may not write to {cache}; set VLLM_CACHE_ROOT"


def marked(arguments: Mapping[str, Any], kernels: str) -> dict[str, Any]:
    """vLLM's arguments with a mark that is part of its compile cache's key.

    It looks a compiled model up by its config before it traces anything, and would find one with other kernels.
    """
    given = arguments.get("additional_config") or {}
    return {**arguments, "additional_config": {**given, "lora_grpo": kernels}}


def compiled_with_lora() -> AbstractContextManager[None]:
    """CPU engines that are configured within are compiled as if they had no LoRA, unless told to be eager."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        lora, config.lora_config = config.lora_config, None
        try:
            stock(cls, config)
        finally:
            config.lora_config = lora

    return replaced(platform, check_and_update_config=classmethod(check_and_update_config))


def experts_without_lora() -> AbstractContextManager[None]:
    """Models that are built within compute their experts as an engine without LoRA does.

    With LoRA on, vLLM picks kernels that could add it to the experts, also where none is wrapped; there are none for
    the CPU.
    """
    layer = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    stock = layer.FusedMoEConfig
    return replaced(layer, FusedMoEConfig=lambda **settings: stock(**{**settings, "is_lora_enabled": False}))
