"""The LoRA of few rows, both products in one call: `rows.cpp`, given tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from lora_grpo.kernels.building import function

FEW_ROWS = {torch.bfloat16: 128, torch.float32: 3}
MOST_WORK = 16_000_000
"""Up to as many rows of one adapter, and as many multiplications and additions, this takes less time than a matrix
library, which spends longer on getting ready. In fp32 it would up to 16 rows; but from 4 rows on torch gives a row the
same bits in whatever batch it is, and a member of a population has to be what it is alone."""

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: tuple[Any, ...] = (
    *(_ADDRESS, _COUNT, _ADDRESS, _COUNT, _COUNT, _COUNT),
    *(ctypes.c_float, ctypes.c_int, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS),
)


class SlotRows:
    """The A's and B's of one slot of a layer, as the compiled function takes them."""

    def __init__(self, call: Any, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        self._call, self._tensors, self._dtype = call, (tuple(a), tuple(b)), a[0].dtype
        self._inputs, self._width = a[0].shape[1], sum(tensor.shape[0] for tensor in b)
        self._work_per_row = sum(tensor.numel() for tensor in (*a, *b))
        addresses = ctypes.c_void_p * len(a)
        self._slices = (
            len(a),
            addresses(*(tensor.data_ptr() for tensor in a)),
            addresses(*(tensor.data_ptr() for tensor in b)),
            a[0].shape[0],
            (ctypes.c_int64 * len(b))(*(tensor.shape[0] for tensor in b)),
        )

    @classmethod
    def of(cls, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> SlotRows | None:
        """Of slices `a[i]` (rank, in) and `b[i]` (out, rank), which stay where they are; None where only torch can
        compute them: in another dtype than bfloat16 or fp32, not dense, of several ranks, or without a compiler."""
        shapes_fit = all(
            one.shape == a[0].shape and other.shape[1] == one.shape[0] for one, other in zip(a, b, strict=True)
        )
        fits = shapes_fit and all(
            one.dtype == a[0].dtype and one.device.type == "cpu" and one.is_contiguous() for one in (*a, *b)
        )
        known = fits and a[0].dtype in FEW_ROWS
        call = function(f"lora_rows_{a[0].dtype}".replace("torch.", ""), *_ARGUMENTS) if known else None
        return call and cls(call, a, b)

    def takes(self, y: torch.Tensor, x: torch.Tensor) -> bool:
        """Whether these are few rows of this layer; they may lie apart, their elements may not."""
        rows = y.shape[0]
        return (
            rows <= FEW_ROWS[self._dtype]
            and rows * self._work_per_row <= MOST_WORK
            and y.dtype == x.dtype == self._dtype
            and y.stride(1) == x.stride(1) == 1
            and x.shape == (rows, self._inputs)
            and y.shape[1] == self._width
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """y (N, out) += scale * (x A^T) B^T, x (N, in), of rows that it `takes`."""
        self._call(
            *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[0], x.shape[1]),
            *(scale, torch.get_num_threads()),
            *self._slices,
        )
