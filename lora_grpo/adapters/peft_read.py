"""Adapter weights back from a published serving form, for a version whose exact trainer weights were not kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from lora_grpo.adapters.peft_files import PREFIX
from lora_grpo.adapters.peft_format import WEIGHTS_FILE, LoraModule, assign
from lora_grpo.adapters.version import AdapterVersion


def read_rounded(version: AdapterVersion) -> dict[str, torch.Tensor]:
    """A version's serving form by tensor name, exact but for the serving dtype's rounding."""
    tensors: dict[str, torch.Tensor] = load_file(version.path / WEIGHTS_FILE)
    return tensors


def assign_rounded(tensors: Mapping[str, torch.Tensor], modules: list[LoraModule]) -> None:
    """Set A and B to what `read_rounded` gave, scaling taken out of B again."""
    for module in modules:
        assign(module.a_RI, tensors[f"{PREFIX}{module.path}.lora_A.weight"])
        assign(module.b_OR, tensors[f"{PREFIX}{module.path}.lora_B.weight"].float() / module.scaling)
