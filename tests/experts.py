"""LoRA on a mixture's experts: PEFT's tensors under vLLM's names, and each expert's share of them.

transformers keeps all experts of a layer in two parameters, `gate_up_proj` and `down_proj`, (experts, out, in) or, as
GPT-OSS, (experts, in, out). PEFT (`target_parameters`) has one A (experts * rank, in), rows of one expert together, and
one B (out, rank * experts), columns of one rank together, for each, and nests its two wrappers as they were named.
vLLM's 3-D form has the same tensors, `gate_up_proj`'s always under `experts.base_layer`, `down_proj`'s under `experts`
(`LoRAModelManager._stack_moe_lora_weights`). A model of one tensor an expert takes it with
`enable_mixed_moe_lora_format`, where the request says `is_3d_lora_weight` (`_convert_3d_to_2d_moe_lora`).

Nothing is served so yet: the slots that vLLM keeps it in are not read back. On an H200 its kernels computed PEFT's
policy from these tensors (tests/test_gpu_experts.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lora_grpo.adapters.peft_form.files import PREFIX
from lora_grpo.adapters.peft_form.modules import LoraModule
from lora_grpo.errors import UnsupportedAdapter

_NAMES = {"gate_up_proj": "experts.base_layer", "down_proj": "experts"}


@torch.no_grad()
def served_experts(modules: Iterable[LoraModule]) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's wrappers of experts by vLLM's names, scaling folded into B.

    Raises `UnsupportedAdapter` for an expert with one of the two parameters alone, which vLLM does not take, and for
    any other parameter, as a router's.
    """
    found: dict[str, dict[str, LoraModule]] = {}
    for module in modules:
        parent = module.path.removesuffix(".base_layer").removesuffix("experts")
        found.setdefault(parent, {})[module.layer.parameter_name] = module
    tensors = {}
    for parent, named in found.items():
        if named.keys() != _NAMES.keys():
            raise UnsupportedAdapter(
                f"{parent}experts: vLLM takes LoRA on {' and '.join(_NAMES)} together, and the adapter has "
                f"{', '.join(sorted(named))}; name both in target_parameters, and nothing else"
            )
        for parameter, name in _NAMES.items():
            a_NI, b_ON = named[parameter].a_RI, named[parameter].b_OR
            tensors[f"{PREFIX}{parent}{name}.lora_A.weight"] = a_NI.detach()
            tensors[f"{PREFIX}{parent}{name}.lora_B.weight"] = b_ON * named[parameter].scaling
    return tensors


def of_each_expert(a_NI: torch.Tensor, b_ON: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (experts, rank, in) and B (experts, out, rank), as vLLM's slots hold them; N is experts * rank."""
    rank = a_NI.shape[0] // experts
    return a_NI.reshape(experts, rank, -1), b_ON.reshape(-1, rank, experts).permute(2, 0, 1)


def gate_and_up(b_EOR: torch.Tensor, *, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of `gate_up_proj`'s B, which share its A: one above the other, or, in GPT-OSS, row by row."""
    if interleaved:
        return b_EOR[:, ::2], b_EOR[:, 1::2]
    gate, up = b_EOR.chunk(2, dim=1)
    return gate, up
