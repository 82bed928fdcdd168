"""The native path with one of vLLM's own switches for its GPU LoRA kernels on: what each is worth."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.native import Native
from lora_grpo.engines import compat
from lora_grpo.errors import ConfigError, UnsupportedVersion

TUNED_VARIABLE = "LORA_GRPO_TUNED_KERNELS"
"""Where `benchmarks/gpu/tune.py` wrote to. Not vLLM's own variable, which the strategies beside would see too."""


class Switched(Native):
    """As `Native`, in a process whose vLLM has `switch` set."""

    switch: ClassVar[str]

    def prepare(self, subject: Subject, seen: Callable[[str], None]) -> None:
        if subject.device == "cpu":
            raise ConfigError(f"{self.decodes_like}: {self.switch} is for GPUs; leave it out on the CPU")
        os.environ[self.switch] = self.value()
        compat.import_vllm()
        if not compat.reads_variable(self.switch):
            raise UnsupportedVersion(
                f"vLLM {'.'.join(map(str, compat.vllm_release()))} has no {self.switch}; leave {self.decodes_like} out"
            )
        super().prepare(subject, seen)

    def value(self) -> str:
        return "1"


class NativeDualStream(Switched):
    """A layer's own product and its LoRA at the same time, on two CUDA streams."""

    summary: ClassVar[str] = "the same, LoRA on a CUDA stream of its own"
    decodes_like: ClassVar[str] = "native-dual-stream"
    switch: ClassVar[str] = "VLLM_LORA_ENABLE_DUAL_STREAM"


class NativeTuned(Switched):
    """vLLM's kernels with the launch settings that were found fastest on this GPU."""

    summary: ClassVar[str] = "the same, launch settings tuned on this GPU"
    decodes_like: ClassVar[str] = "native-tuned"
    switch: ClassVar[str] = "VLLM_TUNED_CONFIG_FOLDER"

    def value(self) -> str:
        folder = os.environ.get(TUNED_VARIABLE, "")
        if not folder or not list(Path(folder).glob("*_EXPAND_TRUE.json")):
            raise ConfigError(
                f"{TUNED_VARIABLE}={folder!r} holds no tuned settings: run benchmarks/gpu/tune.py --out DIR and set it "
                "to DIR"
            )
        return folder
