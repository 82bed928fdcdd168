"""Bases in fewer bits: which of them trainer and engine are proven to compute alike, and the values they stand for."""

from collections.abc import Mapping
from copy import copy
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lora_grpo.errors import UnsupportedAdapter

Scheme: TypeAlias = Literal["nf4", "fp8", "w4a16"]
"""bitsandbytes' nf4, fp8 in blocks of 128 x 128, and compressed-tensors' packed int4 with plain activations."""

NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}
"""QLoRA's settings, which are those that vLLM's loader quantizes with."""
_FP8_DEFAULTS = {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float"}
_FP8 = {"weight_block_size": [128, 128], **_FP8_DEFAULTS}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
_FIX = "take the unquantized checkpoint (with [model] quantization = 'nf4' where memory is short)"


def scheme_of(config: Any) -> Scheme | None:
    """None for plain weights; raises `UnsupportedAdapter` for what no pair of trainer and engine is proven on."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    known: dict[str, tuple[Scheme | None, str | None]] = {
        "bitsandbytes": ("nf4", _other_than(NF4, settings)),
        "fp8": ("fp8", _other_than(_FP8, {**_FP8_DEFAULTS, **settings})),
        "compressed-tensors": ("w4a16", _against_compressed(settings)),
    }
    scheme, reason = known.get(method, (None, "trainer and engine are proven to match only for nf4, fp8 and W4A16"))
    if reason is not None:
        raise UnsupportedAdapter(f"the base is quantized by {method}: {reason}; {_FIX}")
    return scheme


def check_trainable(base: Any) -> None:
    """Raises `UnsupportedAdapter` unless a trainer's base is plain or nf4, as gradients need it, and not packed."""
    scheme = scheme_of(base.config)
    if scheme is None and getattr(base, "is_quantized", False):
        raise UnsupportedAdapter(f"the trainer's base is quantized, but its config does not say how; {_FIX}")
    if scheme not in (None, "nf4"):
        loader = "FineGrainedFP8Config" if scheme == "fp8" else "CompressedTensorsConfig"
        fix = f"load it with quantization_config=transformers.{loader}(dequantize=True)"
        raise UnsupportedAdapter(f"the trainer's base is in {scheme}, whose gradients are not proven: {fix}")
    for name, layer in base.named_modules():
        if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            fix = "load the base again, and do not use it in eval mode before the trainer has it"
            raise UnsupportedAdapter(f"{name}: bitsandbytes has packed it for inference, which loses gradients; {fix}")


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing layers on a CPU in eval mode: it rounds scales and cuts gradients, for good."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of what a trainer's tensor stands for."""
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


def _other_than(proven: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    for name, value in proven.items():
        own = found.get(name)
        if (list(own) if isinstance(own, tuple) else own) != value:
            return f"{name}={own!r}, and {value!r} is proven"
    return None


def _against_compressed(settings: Mapping[str, Any]) -> str | None:
    if settings.get("format") != "pack-quantized":
        return f"format={settings.get('format')!r}, and packed int4 weights with plain activations (W4A16) are proven"
    if settings.get("kv_cache_scheme"):
        return "its KV cache is quantized too"
    for group in settings.get("config_groups", {}).values():
        if group.get("input_activations") or group.get("output_activations"):
            return "its activations are quantized too, which cuts the trainer's gradients"
        weights = group.get("weights") or {}
        if weights.get("actorder") not in (None, "static", "weight"):
            return f"actorder={weights['actorder']!r}, and None is proven"
        if reason := _other_than(_INT4, weights):
            return f"weights: {reason}"
    return None
