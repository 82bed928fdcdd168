"""Many tensors cast or copied in one call: `moving.cpp`, given tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from lora_grpo.kernels.building import function

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64


def _cast_all() -> Any:
    return function("cast_all", _COUNT, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, ctypes.c_int)


def _copy_all() -> Any:
    return function("copy_all", _COUNT, _ADDRESS, _ADDRESS, _ADDRESS, ctypes.c_int)


class Cast:
    """fp32 parameters, each times its scale, into one flat bfloat16 buffer in host memory."""

    def __init__(self, flat: torch.Tensor, sizes: Sequence[int]) -> None:
        """`sizes` are the elements of each parameter; they lie end to end in `flat`, which stays where it is."""
        self._flat, self._sizes = flat, list(sizes)
        starts = [sum(self._sizes[:k]) for k in range(len(self._sizes))]
        self._arrays = _counts(starts), _counts(self._sizes)

    def takes(self, parameters: Sequence[torch.Tensor | None]) -> bool:
        """Whether `run` can do it; ask each time, since parameters may be replaced."""
        fits = self._flat.dtype == torch.bfloat16 and self._flat.is_cpu and _cast_all() is not None
        return fits and all(
            type(one) is torch.nn.Parameter
            and one.dtype == torch.float32
            and one.is_cpu
            and one.is_contiguous()
            and one.numel() == size
            for one, size in zip(parameters, self._sizes, strict=True)
        )

    def run(self, parameters: Sequence[torch.Tensor], scales: Sequence[float]) -> bool:
        """Fill the buffer, scaled in fp32 and rounded once; returns whether everything in it is finite."""
        return bool(
            _cast_all()(
                len(parameters),
                _addresses(parameters),
                *self._arrays,
                (ctypes.c_float * len(scales))(*scales),
                self._flat.data_ptr(),
                torch.get_num_threads(),
            )
        )


class Copies:
    """Copies into tensors that stay where they are, all of one dtype."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        self._dense = all(one.is_cpu and one.is_contiguous() for one in targets)
        self._targets, self._sizes_bytes = list(targets), [one.nbytes for one in targets]
        self._to, self._bytes = _addresses(targets), _counts(self._sizes_bytes)

    def takes(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether `run` can do it: everything is dense, in host memory and of its target's dtype and size."""
        dtype = self._targets[0].dtype
        fits = self._dense and _copy_all() is not None
        return fits and all(
            one.dtype == dtype and one.is_cpu and one.is_contiguous() and one.nbytes == size_bytes
            for one, size_bytes in zip(sources, self._sizes_bytes, strict=True)
        )

    def run(self, sources: Sequence[torch.Tensor]) -> None:
        _copy_all()(len(sources), _addresses(sources), self._to, self._bytes, torch.get_num_threads())


def _addresses(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _counts(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)
