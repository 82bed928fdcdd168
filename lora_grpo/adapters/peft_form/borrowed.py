"""A trainer's model with another version's weights, for as long as something is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_grpo.adapters.peft_form.modules import LoraModule
from lora_grpo.adapters.peft_form.reading import assign_rounded, read_rounded
from lora_grpo.adapters.version import AdapterVersion


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whatever they are made inside, afterwards they are their own again, to the bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)


@contextmanager
def weights_of(version: AdapterVersion, modules: list[LoraModule]) -> Iterator[None]:
    """While inside, A and B are what `version` serves; afterwards they are their own again."""
    with restored([parameter for module in modules for parameter in (module.a_RI, module.b_OR)]):
        assign_rounded(read_rounded(version), modules)
        yield
