"""Layers quantized to fp8 in blocks or to packed int4, on a CPU: the same on every processor.

The plain values of their weights, in the model's dtype, take the place of the quantized ones at the start, and the
products are those of unquantized layers. vLLM's own kernels for them ask for AMX or AVX-512, and some quantize the
activations too, which a trainer with plain values does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def compute_plain_values() -> None:
    """From now on, in this process, vLLM finds these kernels first.

    A second call, or a release that chooses its kernels otherwise, changes nothing.
    """
    linear: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    cpu = importlib.import_module("vllm.platforms").PlatformEnum.CPU
    blocks = getattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS", {}).get(cpu)
    if blocks is not None and not any(kernel.__module__ == __name__ for kernel in blocks):
        blocks.insert(0, _fp8_in_blocks())
    packed = getattr(linear, "_POSSIBLE_KERNELS", {}).get(cpu)
    if packed and packed[0].__module__ != __name__:
        packed.insert(0, _packed_int4())


def _take_plain(layer: Any, dtype: torch.dtype) -> None:
    from lora_grpo.engines.packing import quantized_values

    values = quantized_values(layer)
    assert values is not None
    for name in ("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape"):
        layer._parameters.pop(name, None)
    parameter: Any = importlib.import_module("torch.nn").Parameter
    layer.register_parameter("weight", parameter(values.to(dtype), requires_grad=False))
    layers: Any = importlib.import_module("vllm.model_executor.layers.utils")
    layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def _fp8_in_blocks() -> Any:
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel

    class PlainFp8(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            _take_plain(layer, self.config.out_dtype)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None, **_: Any) -> Any:
            return layer.cpu_linear(x, layer.weight, bias)

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:
            raise NotImplementedError

    return PlainFp8


def _packed_int4() -> Any:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel

    class PlainInt4(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return str(c.weight_type) == "uint4b8" and not c.zero_points, "packed int4 without zero points alone"

        def process_weights_after_loading(self, layer: Any) -> None:
            _take_plain(layer, self.config.act_type)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return layer.cpu_linear(x, layer.weight, bias)

    return PlainInt4
