"""The C++ files of this room, given tensors: compiled on the machine that they run on, and kept in the user's cache.

`rows.cpp` computes the LoRA of few rows, both products in one call; `moving.cpp` casts or copies many tensors in one.
Without a compiler there is a warning, and torch's operators do the same more slowly."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from lora_grpo.user_cache import user_cache

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
PATIENCE_S = 120  # for a compiler; this one's work takes a second
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")

FEW_ROWS = {torch.bfloat16: 128, torch.float32: 3}
MOST_WORK = 16_000_000
"""Up to as many rows of one adapter, and as many multiplications and additions, this takes less time than a matrix
library, which spends longer on getting ready. In fp32 it would up to 16 rows; but from 4 rows on torch gives a row the
same bits in whatever batch it is, and a member of a population has to be what it is alone."""

_ADDRESS, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ROWS = (_ADDRESS, _COUNT, _ADDRESS, *[_COUNT] * 3, ctypes.c_float, _INT, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS)
_MOVING = {"cast_all": (_COUNT, *[_ADDRESS] * 5, _INT), "copy_all": (_COUNT, *[_ADDRESS] * 3, _INT)}
_ARGUMENTS = {"lora_rows_bfloat16": _ROWS, "lora_rows_float32": _ROWS, **_MOVING}


class SlotRows:
    """The A's and B's of one slot of a layer, as the compiled function takes them."""

    def __init__(self, call: Any, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        self._call, self._tensors, self._dtype = call, (tuple(a), tuple(b)), a[0].dtype
        self._inputs, self._width = a[0].shape[1], sum(tensor.shape[0] for tensor in b)
        self._work_per_row = sum(tensor.numel() for tensor in (*a, *b))
        widths = _counts([tensor.shape[0] for tensor in b])
        self._slices = len(a), _addresses(a), _addresses(b), a[0].shape[0], widths

    @classmethod
    def of(cls, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> SlotRows | None:
        """Of slices `a[i]` (rank, in) and `b[i]` (out, rank), which stay where they are; None where only torch can
        compute them: in another dtype than bfloat16 or fp32, not dense, of several ranks, or without a compiler."""
        dtype, shape = a[0].dtype, a[0].shape
        one_rank = all(one.shape == shape for one in a) and all(one.shape[1] == shape[0] for one in b)
        fits = dtype in FEW_ROWS and one_rank and all(_dense(one, dtype) for one in (*a, *b))
        built = library() if fits else None
        return built and cls(getattr(built, f"lora_rows_{dtype}".replace("torch.", "")), a, b)

    def takes(self, y: torch.Tensor, x: torch.Tensor) -> bool:
        """Whether these are few rows of this layer; they may lie apart, their elements may not."""
        rows = y.shape[0]
        if rows > FEW_ROWS[self._dtype] or rows * self._work_per_row > MOST_WORK:
            return False
        dense = y.dtype == x.dtype == self._dtype and y.stride(1) == x.stride(1) == 1
        return dense and x.shape == (rows, self._inputs) and y.shape[1] == self._width

    def add(self, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """y (N, out) += scale * (x A^T) B^T, x (N, in), of rows that it `takes`."""
        rows = y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[0], x.shape[1]
        self._call(*rows, scale, torch.get_num_threads(), *self._slices)


class Cast:
    """fp32 parameters, each times its scale, into one flat bfloat16 buffer in host memory."""

    def __init__(self, flat: torch.Tensor, sizes: Sequence[int]) -> None:
        """`sizes` are the elements of each parameter; they lie end to end in `flat`, which stays where it is."""
        self._flat, self._sizes = flat, list(sizes)
        self._arrays = _counts([sum(sizes[:k]) for k in range(len(sizes))]), _counts(sizes)

    def takes(self, parameters: Sequence[torch.Tensor | None]) -> bool:
        """Ask each time, since parameters may be replaced."""
        fits = self._flat.dtype == torch.bfloat16 and self._flat.is_cpu and library() is not None
        pairs = zip(parameters, self._sizes, strict=True)
        return fits and all(type(p) is Parameter and _dense(p, torch.float32) and p.numel() == n for p, n in pairs)

    def run(self, parameters: Sequence[torch.Tensor], scales: Sequence[float]) -> bool:
        """Fill the buffer, scaled in fp32 and rounded once; returns whether everything in it is finite."""
        factors = (ctypes.c_float * len(scales))(*scales)
        arrays = _addresses(parameters), *self._arrays, factors, self._flat.data_ptr()
        return bool(library().cast_all(len(parameters), *arrays, torch.get_num_threads()))


class Copies:
    """Copies into tensors that stay where they are, all of one dtype."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        self._fit = all(_dense(one, targets[0].dtype) for one in targets)
        self._targets, self._sizes_bytes = list(targets), [one.nbytes for one in targets]
        self._to, self._bytes = _addresses(targets), _counts(self._sizes_bytes)

    def takes(self, sources: Sequence[torch.Tensor]) -> bool:
        dtype, pairs = self._targets[0].dtype, zip(sources, self._sizes_bytes, strict=True)
        fits = self._fit and library() is not None
        return fits and all(_dense(one, dtype) and one.nbytes == size_bytes for one, size_bytes in pairs)

    def run(self, sources: Sequence[torch.Tensor]) -> None:
        library().copy_all(len(sources), _addresses(sources), self._to, self._bytes, torch.get_num_threads())


def _dense(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """In host memory, without gaps."""
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()


def _addresses(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _counts(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@cache
def library() -> Any:
    """What was compiled, a `ctypes.CDLL`, or None where it cannot be compiled or loaded; a warning says why."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    try:
        built = _loaded(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip() or repr(error)
        failed = f"{shlex.join(compiler)} did not compile the CPU kernels, or they cannot be loaded"
        slower = "so decoding with LoRA and syncs are slower on this CPU; install g++, or name one in CXX"
        warnings.warn(f"{failed}, {slower}. It said: {said.splitlines()[0]}", RuntimeWarning, stacklevel=3)
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(built, name).argtypes = arguments
    return built


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(_built(compiler, user_cache())))
    except (OSError, RuntimeError):
        # There is no home, it cannot be written to, or what lies in its cache does not load on this machine.
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_built(compiler, Path(folder))))


def _built(compiler: list[str], folder: Path) -> Path:
    """The library, compiled unless this machine has done so before; two processes that do it at once both succeed."""
    texts = [file.read_text() for file in (*SOURCES, *HEADERS)]
    recipe = (*texts, *FLAGS, *compiler, _run([*compiler, "--version"]), platform.machine(), _processor())
    path = folder / f"kernels-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging, path.name)
            _run([*compiler, *FLAGS, *map(str, SOURCES), "-o", str(made)])
            os.replace(made, path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, errors="replace", timeout=PATIENCE_S, input="")
    return done.stdout


def _processor() -> str:
    """What decides which instructions `-march=native` may use, its flags first, and how it is tuned."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except FileNotFoundError:
        return platform.processor()
    telling = ("flags", "Features", "vendor_id", "cpu family", "model\t", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.startswith(telling))
