"""Intel processors with AMX: the kernel's permission for tiles, which vLLM's CPU attention uses without asking for it.

Linux lets a process use tiles once it has asked (arch_prctl ARCH_REQ_XCOMP_PERM) and ends it with SIGILL before. The
permission is the process's, for all its threads; a fork inherits it and an exec loses it, so each of vLLM's workers,
which it spawns, starts without. oneDNN asks where it is used, which in vLLM 0.32 is for weights above 1 MiB: with a
small bfloat16 model nobody does, and the first attention ends the worker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import warnings

_ARCH_PRCTL = 158
"""The system call's number on x86-64, the only machine with tiles."""
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18


def allow_tiles() -> None:
    """Ask for tiles where the processor has them; where they are refused, a warning, and vLLM computes without."""
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    if not supported():
        return
    refused = _syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    if not refused:
        return
    # What vLLM itself asks before it chooses a kernel with tiles; oneDNN finds out by itself.
    torch.cpu._is_amx_tile_supported = bool
    why = "a thread's alternative signal stack is too small for them" if refused == errno.ENOSPC else "arch_prctl"
    warnings.warn(
        f"this processor has AMX tiles, but the kernel refuses them to this process ({why}: {os.strerror(refused)}): "
        "vLLM computes without them, more slowly; a Linux from 5.16 on, whose sandbox lets arch_prctl through, gives "
        "them",
        RuntimeWarning,
        stacklevel=2,
    )


def _syscall(*arguments: int) -> int:
    """0, or the errno it failed with."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syscall(*map(ctypes.c_long, arguments)) else 0
