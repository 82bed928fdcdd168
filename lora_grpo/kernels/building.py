"""The C++ files of this room, compiled on the machine that they run on and kept in the user's cache.

Without a compiler there is a warning, and torch's operators do the same more slowly.
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
from functools import cache
from pathlib import Path

from lora_grpo.user_cache import user_cache

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled, or None where it cannot be compiled or loaded; a warning says why."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    try:
        return ctypes.CDLL(str(_built(compiler, user_cache())))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{compiler} did not compile the CPU kernels, so decoding with LoRA and syncs are slower on this CPU; "
            f"install g++, or name one in CXX. It said: {said.strip().splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _built(compiler: str, folder: Path) -> Path:
    """The library, compiled unless this machine has done so before; two processes that do it at once both succeed."""
    built_by = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    recipe = (*(file.read_text() for file in (*SOURCES, *HEADERS)), *FLAGS, built_by, platform.machine(), _processor())
    path = folder / f"kernels-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging, path.name)
            command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, path)
    return path


def _processor() -> str:
    """What decides which instructions `-march=native` may use: home folders are shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
