"""`lora_rows.cpp`, compiled on the machine that it runs on, and called with tensors.

Without a compiler there is a warning, and torch's products take its place.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lora_grpo.user_cache import user_cache

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
FEW_ROWS = 32
"""Up to as many rows of one adapter, what a matrix library's product costs at least is more than this costs."""

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: list[Any] = [
    *(_ADDRESS, _COUNT, _ADDRESS, _COUNT, _COUNT, _COUNT),
    *(ctypes.c_float, ctypes.c_int, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS),
]


@cache
def compiled() -> Any:
    """The function, or None where it cannot be compiled or loaded; a warning says why."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    try:
        function = ctypes.CDLL(str(_library(compiler, user_cache()))).lora_rows
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{compiler} did not compile {SOURCE.name}, so decoding with LoRA is slower on this CPU; install g++, or "
            f"name one in CXX. It said: {said.strip().splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    function.argtypes, function.restype = _ARGUMENTS, None
    return function


def _library(compiler: str, folder: Path) -> Path:
    """The library, compiled unless this machine has done so before; two processes that do it at once both succeed."""
    built_by = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    recipe = (SOURCE.read_text(), *FLAGS, built_by, platform.machine(), _processor())
    path = folder / f"lora-rows-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging, path.name)
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
            os.replace(made, path)
    return path


def _processor() -> str:
    """What decides which instructions `-march=native` may use: home folders are shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


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
