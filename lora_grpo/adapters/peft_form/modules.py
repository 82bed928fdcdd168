"""An adapter's modules and the base below them, by a checkpoint's names, sharded or in fewer bits or not."""

import re
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_grpo.errors import UnsupportedAdapter

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LEFT_BEHIND = ("weight_scale", "weight_shape")  # by compressed-tensors, beside weights it has made plain again


@dataclass(frozen=True)
class LoraModule:
    """An adapted linear layer. `path`: its name in the base, no wrapper or prefix. A is (rank, in), B (out, rank)."""

    path: str
    layer: LoraLayer
    adapter: str

    @property
    def a_RI(self) -> nn.Parameter:
        return self.layer.lora_A[self.adapter].weight

    @property
    def b_OR(self) -> nn.Parameter:
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])

    @property
    def idle(self) -> str | None:
        """Why the model does not compute with its A and B as they are, and the fix."""
        if self.layer.disable_adapters:
            return "has its adapter disabled: call model.base_model.enable_adapter_layers()"
        return "is merged into the base: call model.unmerge_adapter()" if self.layer.merged else None


def clean_name(name: str) -> str:
    return _WRAPPERS.sub("", name)


def peft_model_of(model: nn.Module) -> Any:
    """The PeftModel inside whatever wraps it (DDP, torch.compile); raises `UnsupportedAdapter` when there is none."""
    inner: Any = model
    while not hasattr(inner, "peft_config"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            fix = "wrap it with peft.get_peft_model(model, LoraConfig())"
            raise UnsupportedAdapter(f"{type(model).__name__} holds no PEFT adapter; {fix}")
    return inner


def lora_modules(model: nn.Module, adapter: str) -> list[LoraModule]:
    named = peft_model_of(model).base_model.model.named_modules()
    adapted = ((name, layer) for name, layer in named if isinstance(layer, LoraLayer) and adapter in layer.lora_A)
    return [LoraModule(clean_name(name), layer, adapter) for name, layer in adapted]


def is_multimodal(base: Any) -> bool:
    """Whether a transformers model, or its config, is one of a language model beside others, as a vision tower."""
    config = getattr(base, "config", base)
    return config.get_text_config() is not config


def language_path(base: Any) -> str:
    """What the names of its layers begin with in a multimodal model; in another one, nothing."""
    if not is_multimodal(base):
        return ""
    decoder = base.get_decoder()
    return next(f"{clean_name(name)}." for name, module in base.named_modules() if module is decoder)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A PEFT model's base by its checkpoint's names: parameters, tied ones under each name, and saved buffers."""
    found = {}
    for prefix, module in peft_model_of(model).base_model.model.named_modules(remove_duplicate=False):
        named = {**module._parameters, **module._buffers}
        for leaf in [leaf for leaf in named if leaf not in module._non_persistent_buffers_set]:
            name = clean_name(f"{prefix}.{leaf}").replace(".base_layer.", ".")
            if named[leaf] is not None and ".lora_" not in name and leaf not in _LEFT_BEHIND:
                found[name] = named[leaf]
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter, gradient or moment that FSDP2 may have sharded (then a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """`full` on the parameter's device, cut as the parameter is; every process holds the same `full`."""
    full = full.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def assign(parameter: torch.Tensor, full: torch.Tensor) -> None:
    parameter.copy_(sharded_like(parameter, full))


def reshard(model: nn.Module) -> None:
    """Back to shards what FSDP2 keeps whole after a forward without a backward: what is written to those copies,
    or asked of them, never reaches the parameters that the optimizer holds."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing layers on a CPU in eval mode: it rounds scales and cuts gradients, for good."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple((getattr(tensor, "quant_state", None) or tensor).shape)


def plain_values(tensor: torch.Tensor) -> torch.Tensor:
    """What a trainer's tensor stands for: fp32 (rows, columns) of one in nf4, any other as it is."""
    state = getattr(tensor, "quant_state", None)
    return tensor if state is None else nf4_values(tensor.data, state)


@torch.no_grad()
def nf4_values(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """fp32 (rows, columns) of bitsandbytes' 4 bits with their scales."""
    from bitsandbytes.functional import dequantize_4bit

    exact = copy(state)
    exact.dtype = torch.float32
    return dequantize_4bit(packed.reshape(-1, 1), exact)
