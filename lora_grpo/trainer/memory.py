"""What a run takes of memory, from its model's config alone, before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_grpo.adapters.peft_form.quantized import Scheme
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.grpo.modes import base_dtype
from lora_grpo.trainer.activations import LargestBatch, activation_bytes
from lora_grpo.trainer.models import checkpoint_of, default_device, lora_rank, quantization_of, without_memory

_ADAM_BYTES = 4 + 4 + 4 + 4
"""fp32 weight, gradient and two moments of each adapter parameter."""
_QUANTIZED_BYTES: dict[Scheme | None, tuple[float | None, float | None]] = {
    "nf4": (1 / 2 + 1 / 64 + 4 / (64 * 256), 1 / 2 + 4 / 64),
    "fp8": (None, 1 + 4 / (128 * 128)),
    "w4a16": (None, 1 / 2 + 2 / 128),
}
"""A weight's in trainer and engine, scales included; None: the dtype's. vLLM keeps nf4's scales in fp32. On a CPU the
engine's fp8 and int4 are plain values in its dtype (`engines/packing.py`)."""

_SMALLER = {
    "trainer base": "hold it in half precision (model.dtype='bfloat16') or once with the engine (share_base_weights)",
    "adapter and optimizer": "lower the adapter's rank",
    "activations": "lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much), shorten "
    "max_completion_length, or set gradient_checkpointing=true",
    "engine base": "serve it in half precision (engine.dtype='bfloat16')",
    "adapter slots": "lower max_lora_rank or max_loras",
    "kv": "lower gpu_memory_utilization on a GPU, VLLM_CPU_KVCACHE_SPACE on a CPU",
}
"""What makes each part smaller."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of the trainer's base, its adapter with optimizer, what a step computes, and the engine's parts."""

    trainer_base_bytes: int
    adapter_and_optimizer_bytes: int
    activations_bytes: int | None
    """None: the model could not be walked through; see `activation_bytes`."""
    engine_base_bytes: int
    adapter_slots_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {mib(size_bytes)}" for name, size_bytes in self.parts().items())
        unknown = " without activations, which cannot be estimated" if self.activations_bytes is None else ""
        return f"{mib(self.total_bytes)}{unknown} ({parts})"

    def parts(self) -> dict[str, int]:
        """The bytes of each part that is known, by a name for people."""
        values = {
            field.name.removesuffix("_bytes").replace("_", " "): getattr(self, field.name) for field in fields(self)
        }
        return {name: size_bytes for name, size_bytes in values.items() if size_bytes is not None}

    def what_helps(self) -> str:
        """What makes the largest part smaller."""
        parts = self.parts()
        return _SMALLER[max(parts, key=parts.__getitem__)]


def mib(size_bytes: int) -> str:
    """For people: "1,234.5 MiB"."""
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def estimate_memory(
    model: Any,
    batch: LargestBatch,
    *,
    checkpointing: bool,
    slots: int,
    max_lora_rank: int,
    trainer_dtype: torch.dtype,
    engine_dtype: torch.dtype,
    shared_base: bool = False,
    scheme: Scheme | None = None,
) -> MemoryEstimate:
    """The estimate for a PEFT model on the meta device that learns from `batch` at a time; its KV cache is left out.

    With `shared_base` the trainer's base is the engine's. `scheme` is how linear layers are quantized.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    slot = sum(max_lora_rank * (module.in_features + module.out_features) for module in adapted)
    quantized = _linear_elements(model) if scheme else 0
    plain = sum(p.numel() for p in model.parameters()) - trained - quantized
    trainer_bytes, engine_bytes = _QUANTIZED_BYTES.get(scheme, (None, None))

    def base_bytes(dtype: torch.dtype, each: float | None) -> int:
        return plain * dtype.itemsize + int(quantized * (each or dtype.itemsize))

    activations = activation_bytes(model.to(trainer_dtype), batch, trainer_dtype, checkpointing=checkpointing)
    return MemoryEstimate(
        trainer_base_bytes=0 if shared_base else base_bytes(trainer_dtype, trainer_bytes),
        adapter_and_optimizer_bytes=trained * _ADAM_BYTES,
        activations_bytes=activations,
        engine_base_bytes=base_bytes(engine_dtype, engine_bytes),
        adapter_slots_bytes=slot * slots * engine_dtype.itemsize,
        kv_bytes=0,
    )


def available_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device, or available to the system for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) << 10


def estimate(
    model: ModelConfig | nn.Module,
    peft_config: Any,
    config: EngineConfig | None,
    batch: LargestBatch,
    shared_base: bool,
    checkpointing: bool,
) -> MemoryEstimate:
    """What a run takes; without a `config`, the engine is there already."""
    own = EngineConfig() if config is None else config
    empty = without_memory(model, peft_config)
    elsewhere = config is None or bool(config.urls)
    needed = estimate_memory(
        empty,
        batch,
        checkpointing=checkpointing,
        slots=own.max_loras,
        max_lora_rank=own.max_lora_rank or lora_rank(model, peft_config),
        trainer_dtype=_trainer_dtype(model, empty),
        engine_dtype=engine_dtype(own),
        shared_base=shared_base or isinstance(model, nn.Module),
        scheme=None if elsewhere and isinstance(model, nn.Module) else quantization_of(checkpoint_of(model)),
    )
    if elsewhere:
        return replace(needed, engine_base_bytes=0, adapter_slots_bytes=0)
    return replace(needed, kv_bytes=_kv_bytes(own, needed.engine_base_bytes + needed.adapter_slots_bytes))


def version_bytes(needed: MemoryEstimate, config: EngineConfig) -> int:
    """Of a version's tensors, in the engine's dtype."""
    return needed.adapter_and_optimizer_bytes // _ADAM_BYTES * engine_dtype(config).itemsize


def _kv_bytes(config: EngineConfig, weights_bytes: int) -> int:
    """On CUDA what vLLM leaves of its share beside its weights, on the CPU what it takes for the KV cache alone."""
    if default_device().type == "cuda":
        return max(0, int(torch.cuda.mem_get_info()[1] * config.gpu_memory_utilization) - weights_bytes)
    return int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) << 30


def engine_dtype(config: EngineConfig) -> torch.dtype:
    """ "auto" is a half-precision one whatever the checkpoint has: vLLM serves fp32 checkpoints in one too."""
    dtype: torch.dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    return dtype


def _trainer_dtype(model: ModelConfig | nn.Module, empty: Any) -> torch.dtype:
    if isinstance(model, nn.Module):
        return base_dtype(model)
    dtype: torch.dtype = getattr(torch, model.dtype, None) or empty.config.dtype or torch.float32
    return dtype


def _linear_elements(model: Any) -> int:
    """Weights of the base's linear layers, its head left out."""
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    base = [module for name, module in layers.items() if module is not head and ".lora_" not in name]
    return sum(module.weight.numel() for module in base)
