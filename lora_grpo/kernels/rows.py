"""The LoRA of few rows, both products in one call: `rows.cpp`, given tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from lora_grpo.kernels.building import library

FEW_ROWS = 32
"""Up to as many rows of one adapter, what a matrix library's product costs at least is more than this costs."""

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: list[Any] = [
    *(_ADDRESS, _COUNT, _ADDRESS, _COUNT, _COUNT, _COUNT),
    *(ctypes.c_float, ctypes.c_int, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS),
]


@cache
def compiled() -> Any:
    """The function, or None where nothing could be compiled."""
    built = library()
    if built is None:
        return None
    function = built.lora_rows
    function.argtypes, function.restype = _ARGUMENTS, None
    return function


class SlotRows:
    """The A's and B's of one slot of a layer, as the function takes them."""

    def __init__(self, function: Any, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        """`a[i]` is (rank, in), `b[i]` (out, rank): bfloat16 and dense, as `takes` says. Both stay where they are."""
        self._function, self._tensors = function, (tuple(a), tuple(b))
        addresses = ctypes.c_void_p * len(a)
        self._slices = (
            len(a),
            addresses(*(tensor.data_ptr() for tensor in a)),
            addresses(*(tensor.data_ptr() for tensor in b)),
            a[0].shape[0],
            (ctypes.c_int64 * len(b))(*(tensor.shape[0] for tensor in b)),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """y (N, out) += scale * (x A^T) B^T, x (N, in), where `can_add` says so."""
        self._function(
            *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[0], x.shape[1]),
            *(scale, torch.get_num_threads()),
            *self._slices,
        )


def takes(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether `SlotRows` can be made of these slices."""
    return len({tensor.shape[0] for tensor in a}) == 1 and all(
        tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (*a, *b)
    )


def can_add(y: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether these are few rows, as `SlotRows.add` takes them: they may lie apart, their elements may not."""
    return y.shape[0] <= FEW_ROWS and y.dtype == x.dtype == torch.bfloat16 and y.stride(1) == x.stride(1) == 1
