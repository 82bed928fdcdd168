"""What a run will hold in memory, from the model's config alone, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_grpo.adapters.quantized import Scheme
from lora_grpo.engines.local.targets import skeleton
from lora_grpo.errors import ConfigError

_ADAM_BYTES = 4 + 4 + 4 + 4
"""fp32 weight, gradient and two moments of each adapter parameter."""
_QUANTIZED_BYTES: dict[Scheme | None, tuple[float | None, float | None]] = {
    "nf4": (1 / 2 + 1 / 64 + 4 / (64 * 256), 1 / 2 + 4 / 64),
    "fp8": (None, 1 + 4 / (128 * 128)),
    "w4a16": (None, 1 / 2 + 2 / 128),
}
"""A weight's in trainer and engine, scales included; None: the dtype's. vLLM keeps nf4's scales in fp32. On a CPU that
vLLM has no kernel for (`engines/without_kernel.py`) the engine's weights are in its dtype."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes, without activations: the trainer's base, its adapter with optimizer, and the engine's parts."""

    trainer_base_bytes: int
    adapter_and_optimizer_bytes: int
    engine_base_bytes: int
    adapter_slots_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {mib(size_bytes)}" for name, size_bytes in self.parts().items())
        return f"{mib(self.total_bytes)} without activations ({parts})"

    def parts(self) -> dict[str, int]:
        """The bytes of each part, by a name for people."""
        return {
            field.name.removesuffix("_bytes").replace("_", " "): getattr(self, field.name) for field in fields(self)
        }


def mib(size_bytes: int) -> str:
    """For people: "1,234.5 MiB"."""
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def estimate_memory(
    model: str | Path,
    *,
    rank: int,
    targets: set[str] | None,
    slots: int,
    max_lora_rank: int,
    trainer_dtype: torch.dtype,
    engine_dtype: torch.dtype,
    kv_tokens: int,
    shared_base: bool = False,
    scheme: Scheme | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MemoryEstimate:
    """The estimate for a checkpoint; `targets` are last names of adapted layers (None: every linear layer).

    With `shared_base` the trainer's base is the engine's. `scheme` is how linear layers are quantized.
    """
    built = skeleton(model, revision=revision, trust_remote_code=trust_remote_code)
    head = built.get_output_embeddings()
    linears = [(n, m) for n, m in built.named_modules() if isinstance(m, nn.Linear) and m is not head]
    adapted = [m for n, m in linears if targets is None or n.rsplit(".", 1)[-1] in targets]
    quantized = sum(m.weight.numel() for _, m in linears) if scheme else 0
    plain = sum(p.numel() for p in built.parameters()) - quantized
    trainer_bytes, engine_bytes = _QUANTIZED_BYTES.get(scheme, (None, None))

    def base_bytes(dtype: torch.dtype, each: float | None) -> int:
        return plain * dtype.itemsize + int(quantized * (each or dtype.itemsize))

    return MemoryEstimate(
        trainer_base_bytes=0 if shared_base else base_bytes(trainer_dtype, trainer_bytes),
        adapter_and_optimizer_bytes=_lora_elements(adapted, rank) * _ADAM_BYTES,
        engine_base_bytes=base_bytes(engine_dtype, engine_bytes),
        adapter_slots_bytes=_lora_elements([m for _, m in linears], max_lora_rank) * slots * engine_dtype.itemsize,
        kv_bytes=kv_tokens * _kv_bytes_per_token(built.config, engine_dtype),
    )


def require_memory(estimate: MemoryEstimate, available_bytes: int, where: str) -> None:
    """Raises `ConfigError` with the parts when the estimate exceeds what is there."""
    if estimate.total_bytes > available_bytes:
        raise ConfigError(
            f"the run needs {estimate}, and {where} has {mib(available_bytes)} free: use a smaller model, a "
            "half-precision trainer (model.dtype='bfloat16'), a lower max_lora_rank or fewer max_loras"
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


def _lora_elements(linears: list[nn.Linear], rank: int) -> int:
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def _kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(head_dim) * dtype.itemsize
