"""Adapter weights back from a published serving form, for a version whose exact trainer weights were not kept."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from lora_grpo.adapters.peft_files import PREFIX
from lora_grpo.adapters.peft_format import WEIGHTS_FILE, LoraModule
from lora_grpo.adapters.version import AdapterVersion


@torch.no_grad()
def load_rounded(version: AdapterVersion, modules: list[LoraModule]) -> None:
    """Set A and B from the serving form, scaling taken out of B again; exact but for the serving dtype's rounding."""
    tensors = load_file(version.path / WEIGHTS_FILE)
    for module in modules:
        module.a_RI.copy_(tensors[f"{PREFIX}{module.path}.lora_A.weight"])
        module.b_OR.copy_(tensors[f"{PREFIX}{module.path}.lora_B.weight"].float() / module.scaling)
