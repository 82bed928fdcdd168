"""The C++ files of this room, compiled on the machine that they run on and kept in the user's cache.

Without a compiler there is a warning, and torch's operators do the same more slowly.
"""

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
from functools import cache
from pathlib import Path
from typing import Any

from lora_grpo.user_cache import user_cache

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
PATIENCE_S = 120
"""For a compiler; this one's work takes a second."""

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


@cache
def function(name: str, *arguments: Any) -> Any:
    """A compiled function that takes `arguments` (ctypes) and returns an int, or None where there is no library."""
    built = library()
    if built is None:
        return None
    found = getattr(built, name)
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled, or None where it cannot be compiled or loaded; a warning says why."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    try:
        return _loaded(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip() or repr(error)
        warnings.warn(
            f"{shlex.join(compiler)} did not compile the CPU kernels, or they cannot be loaded, so decoding with LoRA "
            f"and syncs are slower on this CPU; install g++, or name one in CXX. It said: {said.splitlines()[0]}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


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
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


def _processor() -> str:
    """What decides which instructions `-march=native` may use, its flags first, and how it is tuned."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except FileNotFoundError:
        return platform.processor()
    telling = ("flags", "Features", "vendor_id", "cpu family", "model\t", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.startswith(telling))
