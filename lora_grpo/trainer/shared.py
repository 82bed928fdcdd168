"""What several trainers in one process have in common: the engine, the base, and what was proven of both."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.proving import Proofs


@dataclass(frozen=True)
class Shared:
    """`base` is a transformers model that nothing trains; each trainer adapts modules of its own on its tensors."""

    engine: Engine
    base: Any
    checkpointing: bool = False
    """Whether activations are computed twice, for trainers whose settings leave it open."""
    proofs: Proofs = field(default_factory=dict)

    def own_modules(self) -> Any:
        """A model like the base, whose parameters and buffers are the base's own tensors.

        PEFT puts a trainer's adapter into its modules, so that nothing of one trainer is seen by another: no active
        adapter, no dropout, no mode.
        """
        tensors = [*self.base.parameters(), *self.base.buffers()]
        # bitsandbytes keeps a weight's scales beside it.
        states = [getattr(tensor, "quant_state", None) for tensor in tensors]
        return deepcopy(self.base, {id(one): one for one in [*tensors, *states] if one is not None})
