"""The native path with vLLM's second CUDA stream for LoRA: what that is worth."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ClassVar

from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.native import Native
from lora_grpo.engines import compat
from lora_grpo.errors import ConfigError, UnsupportedVersion

SWITCH = "VLLM_LORA_ENABLE_DUAL_STREAM"


class NativeDualStream(Native):
    """A layer's own product and its LoRA at the same time, in a process whose vLLM has `SWITCH` set."""

    summary: ClassVar[str] = "the same, LoRA on a CUDA stream of its own"
    decodes_like: ClassVar[str] = "native-dual-stream"

    def prepare(self, subject: Subject, seen: Callable[[str], None]) -> None:
        if subject.device == "cpu":
            raise ConfigError(f"{self.decodes_like}: {SWITCH} is for GPUs; leave it out on the CPU")
        os.environ[SWITCH] = "1"
        compat.import_vllm()
        if not compat.reads_variable(SWITCH):
            raise UnsupportedVersion(
                f"vLLM {'.'.join(map(str, compat.vllm_release()))} has no {SWITCH}; leave {self.decodes_like} out"
            )
        super().prepare(subject, seen)
