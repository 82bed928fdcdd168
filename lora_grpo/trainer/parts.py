"""What a trainer drives: an engine, a PEFT model with its policy, and the sync between the two."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_grpo.engines.base import Engine
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync


@dataclass(frozen=True)
class Parts:
    """One process's. With several processes, the first one's `engine` stands for all of theirs.

    `rendering` is that engine, asked in prompts as the trainer's tokenizer renders them.
    """

    engine: Engine
    rendering: Engine
    model: nn.Module
    policy: Policy
    sync: NativeSync
