"""Weights that vLLM's CPU backend packs for its kernels: read just before it does, for it frees their plain form."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that two bases can be compared in; others are quantized."""

_BLOCK_BYTES = 32 << 20
_PACKED = "_lora_grpo_packed"


@torch.no_grad()
def digest(rows: torch.Tensor, dtype: torch.dtype) -> str:
    """xxh3-128 of a tensor's values in `dtype`, end to end; a block at a time, wherever it lives."""
    hasher = xxhash.xxh3_128()
    flat = rows.detach().reshape(rows.shape[0], -1) if rows.ndim > 1 else rows.detach().reshape(-1, 1)
    step = max(1, _BLOCK_BYTES // max(1, flat.shape[1] * dtype.itemsize))
    plain = flat.device.type == "cpu" and flat.dtype == dtype
    room = None if plain else _room(min(step, flat.shape[0]) * flat.shape[1], dtype, pinned=flat.is_cuda)
    for block in flat.split(step):
        here = block if room is None else room[: block.numel()].view(block.shape).copy_(block.to(dtype))
        hasher.update(here.contiguous().view(torch.uint8).numpy().data)
    return str(hasher.hexdigest())


def _room(elements: int, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """One place on the host for every block: a GPU copies to pinned memory several times as fast as to new memory."""
    return torch.empty(elements, dtype=dtype, pin_memory=pinned)


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as it was before a layer packed it: digests of the layer's slices."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digests: dict[int, str]


def packed_form(layer: Any, kind: str) -> Packed | None:
    """What was read of a layer's "weight" or "bias" before it was packed; None where it has its plain form still."""
    found: Packed | None = getattr(layer, _PACKED, {}).get(kind)
    return found


def read_before_packing() -> None:
    """From now on, in this process: whatever the CPU backend packs is read first. A second call does nothing."""
    layers: Any = importlib.import_module("vllm.model_executor.layers.utils")
    stock = getattr(layers, "dispatch_cpu_unquantized_gemm", None)
    if stock is None or hasattr(stock, "stock"):
        return

    def dispatch(layer: Any, remove_weight: bool) -> None:
        before = dict(_readable(layer)) if remove_weight else {}
        read = {kind: _before(layer, tensor) for kind, tensor in before.items()}
        stock(layer, remove_weight)
        packed = {kind: read[kind] for kind, tensor in before.items() if not _still(layer, kind, tensor)}
        setattr(layer, _PACKED, packed)

    dispatch.stock = stock  # type: ignore[attr-defined]
    layers.dispatch_cpu_unquantized_gemm = dispatch


def _readable(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in ("weight", "bias"):
        tensor = getattr(layer, kind, None)
        if tensor is not None and not tensor.is_meta and tensor.numel() and tensor.dtype in PLAIN:
            yield kind, tensor.data


def _before(layer: Any, tensor: torch.Tensor) -> Packed:
    sizes = list(getattr(layer, "output_partition_sizes", None) or ())
    if sum(sizes) != tensor.shape[0]:
        sizes = [tensor.shape[0]]
    digests = {index: digest(rows, tensor.dtype) for index, rows in enumerate(tensor.split(sizes))}
    return Packed(tensor.dtype, tuple(tensor.shape), digests)


def _still(layer: Any, kind: str, tensor: torch.Tensor) -> bool:
    """Whether a layer holds the same values in the same place as before."""
    now = getattr(layer, kind, None)
    return now is not None and (now.data_ptr(), now.shape, now.dtype) == (tensor.data_ptr(), tensor.shape, tensor.dtype)
