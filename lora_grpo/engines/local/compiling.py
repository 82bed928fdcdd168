"""vLLM's compiler on the CPU, with LoRA.

vLLM compiles a model there, but none with LoRA: its own LoRA path cannot be traced. Ours is one operator to the
compiler.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_grpo.kernels.building import library


def can_compile() -> bool:
    """Whether there is what compiled code is built with: a C++ compiler and Python's headers."""
    return Path(sysconfig.get_path("include"), "Python.h").exists() and library() is not None


def engine_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's arguments with a mark that is part of its compile cache's key: compiled models call our operator."""
    given = arguments.get("additional_config") or {}
    return {**arguments, "additional_config": {**given, "lora_grpo": "add_cpu_lora"}}


@contextmanager
def compiled_with_lora(wanted: bool) -> Iterator[None]:
    """CPU engines that are configured within are compiled as if they had no LoRA, unless told to be eager."""
    if not wanted:
        yield
        return
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    stock = vars(platform)["check_and_update_config"]

    def check_and_update_config(cls: Any, config: Any) -> None:
        lora, config.lora_config = config.lora_config, None
        try:
            stock.__func__(cls, config)
        finally:
            config.lora_config = lora

    platform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        platform.check_and_update_config = stock
