"""Weights that vLLM packs or keeps quantized: read while their form is known, and computed with plainly on a CPU."""

import importlib
from typing import Any, NamedTuple

import torch
import xxhash

from lora_grpo.engines.compat.patching import wrap_once

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that two bases are compared in; others are quantized."""

_BLOCK_BYTES = 32 << 20
_PACKED = "_lora_grpo_packed"


@torch.no_grad()
def digest(rows: torch.Tensor, dtype: torch.dtype) -> str:
    """xxh3-128 of a tensor's values in `dtype`, end to end; a block at a time, wherever it lives."""
    hasher = xxhash.xxh3_128()
    flat = rows.detach().reshape(rows.shape[0], -1) if rows.ndim > 1 else rows.detach().reshape(-1, 1)
    step = max(1, _BLOCK_BYTES // max(1, flat.shape[1] * dtype.itemsize))
    plain = flat.device.type == "cpu" and flat.dtype == dtype
    # One place on the host for every block: a GPU copies to pinned memory several times as fast as to new memory.
    elements = min(step, flat.shape[0]) * flat.shape[1]
    room = None if plain else torch.empty(elements, dtype=dtype, pin_memory=flat.is_cuda)
    for block in flat.split(step):
        here = block if room is None else room[: block.numel()].view(block.shape).copy_(block.to(dtype))
        hasher.update(here.contiguous().view(torch.uint8).numpy().data)
    return str(hasher.hexdigest())


class Packed(NamedTuple):
    """A tensor before it was packed: digests of its layer's slices in `dtype`, of the values that it stands for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digests: dict[int, str]
    quantized: bool = False


def packed_form(layer: Any, kind: str) -> Packed | None:
    """What was read of a layer's "weight" or "bias" before it was packed; None where it has its plain form still."""
    return getattr(layer, _PACKED, {}).get(kind)


def read_before_packing() -> None:
    """From now on, in this process: whatever the CPU backend packs is read first."""

    def dispatch(stock: Any, layer: Any, remove_weight: bool) -> None:
        found = {kind: getattr(layer, kind, None) for kind in ("weight", "bias")} if remove_weight else {}
        before = {kind: one.data for kind, one in found.items() if one is not None and _is_readable(one)}
        read = {kind: _before(layer, tensor, tensor.dtype) for kind, tensor in before.items()}
        stock(layer, remove_weight)
        packed = {kind: read[kind] for kind, tensor in before.items() if not _still(layer, kind, tensor)}
        # What was quantized before it was plain is told so.
        setattr(layer, _PACKED, packed | getattr(layer, _PACKED, {}))

    wrap_once(importlib.import_module("vllm.model_executor.layers.utils"), "dispatch_cpu_unquantized_gemm", dispatch)


def read_quantized() -> None:
    """From now on, in this process: what is quantized is read before vLLM brings it into its kernels' form."""

    def process(stock: Any, model: Any, model_config: Any, *others: Any) -> None:
        for layer in model.modules():
            if (values := quantized_values(layer)) is not None:
                setattr(layer, _PACKED, {"weight": _before(layer, values, model_config.dtype, quantized=True)})
        stock(model, model_config, *others)

    loader = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    wrap_once(loader, "process_weights_after_loading", process)


@torch.no_grad()
def quantized_values(layer: Any) -> torch.Tensor | None:
    """fp32 (rows, columns) of a vLLM layer's weight as it was loaded, if that is nf4, fp8 in blocks or packed int4."""
    weight: Any = getattr(layer, "weight", None)
    states = getattr(weight, "bnb_quant_state", None)
    if isinstance(states, dict):
        # PEFT takes seconds to import, in each of vLLM's processes.
        from lora_grpo.adapters.peft_form.modules import nf4_values

        pieces = weight.data.split(weight.bnb_shard_offsets.diff().tolist())
        return torch.cat([nf4_values(piece, states[index]) for index, piece in enumerate(pieces)])
    block, scale = getattr(layer, "weight_block_size", None), getattr(layer, "weight_scale_inv", None)
    if block is not None and scale is not None and weight is not None and weight.dtype == torch.float8_e4m3fn:
        sizes = list(getattr(layer, "output_partition_sizes", None) or [weight.shape[0]])
        scales = scale.float().split([-(-rows // block[0]) for rows in sizes])
        pairs = zip(weight.split(sizes), scales, strict=True)
        return torch.cat([rows.float() * _spread(scale, block, rows.shape) for rows, scale in pairs])
    packed = getattr(layer, "weight_packed", None)
    if packed is not None and packed.dtype == torch.int32 and hasattr(layer, "weight_scale"):
        # Eight columns in each int32, the first in its lowest bits, as 0 ... 15 for -8 ... 7; a scale a group of them.
        shifts = torch.arange(0, 32, 4, device=packed.device)
        columns = ((packed.unsqueeze(2) >> shifts) & 15).flatten(1) - 8
        scale = layer.weight_scale.float()
        return columns * scale.repeat_interleave(columns.shape[1] // scale.shape[1], 1)
    return None


def _spread(scale: torch.Tensor, block: Any, shape: Any) -> torch.Tensor:
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def _is_readable(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0 and tensor.dtype in PLAIN


def _before(layer: Any, tensor: torch.Tensor, dtype: torch.dtype, *, quantized: bool = False) -> Packed:
    sizes = list(getattr(layer, "output_partition_sizes", None) or ())
    if sum(sizes) != tensor.shape[0]:
        sizes = [tensor.shape[0]]
    digests = {index: digest(rows, dtype) for index, rows in enumerate(tensor.split(sizes))}
    return Packed(dtype, tuple(tensor.shape), digests, quantized)


def _still(layer: Any, kind: str, tensor: torch.Tensor) -> bool:
    now = getattr(layer, kind, None)
    return now is not None and (now.data_ptr(), now.shape, now.dtype) == (tensor.data_ptr(), tensor.shape, tensor.dtype)


def compute_plain_values() -> None:
    """From now on, in this process: on a CPU, layers quantized to fp8 in blocks or to packed int4 are computed with the
    plain values of their weights, the same on every processor. vLLM's own kernels ask for AMX or AVX-512, and some
    quantize the activations too, which a trainer does not. A release with other registries is left alone."""
    linear: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    cpu = importlib.import_module("vllm.platforms").PlatformEnum.CPU
    for registry, made in (("_POSSIBLE_FP8_BLOCK_KERNELS", _fp8_in_blocks), ("_POSSIBLE_KERNELS", _packed_int4)):
        kernels = getattr(linear, registry, {}).get(cpu)
        if kernels is not None and not any(kernel.__module__ == __name__ for kernel in kernels):
            kernels.insert(0, made())


class _PlainKernel:
    config: Any

    def process_weights_after_loading(self, layer: Any) -> None:
        values = quantized_values(layer)
        assert values is not None
        for name in ("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape"):
            layer._parameters.pop(name, None)
        dtype = self.config.act_type if hasattr(self.config, "act_type") else self.config.out_dtype
        layer.register_parameter("weight", torch.nn.Parameter(values.to(dtype), requires_grad=False))
        layers: Any = importlib.import_module("vllm.model_executor.layers.utils")
        layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def apply_weights(self, layer: Any, x: Any, bias: Any = None, **_: Any) -> Any:
        return layer.cpu_linear(x, layer.weight, bias)


def _fp8_in_blocks() -> Any:
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel

    class PlainFp8(_PlainKernel, Fp8BlockScaledMMLinearKernel):
        apply_block_scaled_mm: Any = None

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

    return PlainFp8


def _packed_int4() -> Any:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel

    class PlainInt4(_PlainKernel, MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return str(c.weight_type) == "uint4b8" and not c.zero_points, "packed int4 without zero points alone"

    return PlainInt4
