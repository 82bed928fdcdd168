"""A trainer's model with another version's weights, for as long as something is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_grpo.adapters.peft_format import LoraModule
from lora_grpo.adapters.peft_read import assign_rounded, read_rounded
from lora_grpo.adapters.version import AdapterVersion


@contextmanager
def weights_of(version: AdapterVersion, modules: list[LoraModule]) -> Iterator[None]:
    """While inside, A and B are what `version` serves; afterwards they are their own again, to the bit."""
    parameters = [parameter for module in modules for parameter in (module.a_RI, module.b_OR)]
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        assign_rounded(read_rounded(version), modules)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)
