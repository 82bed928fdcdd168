"""A process that dies, or whose disk fails, at its n-th system call on files."""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = (
    "open", "write", "writev", "pwrite", "read", "fsync", "ftruncate", "close", "mkdir", "rmdir", "rename", "replace",
    "unlink", "symlink", "readlink", "link", "listdir", "scandir", "stat", "lstat", "chmod", "statvfs",
)  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS, errno.EDQUOT, errno.EINTR, errno.ESTALE)


class Calls:
    """Counts this process's calls; at the `stop`-th it is killed, before or after it, or the call fails with `error`.

    A descriptor is closed all the same: the kernel lets go of it even where `close` fails.
    """

    def __init__(self, stop: int = 0, *, after: bool = False, error: int | None = None) -> None:
        self.count = 0
        self.hit: str | None = None
        self._stop, self._after, self._error = stop, after, error

    def watch(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        builtins.open = self._wrapped("open", builtins.open)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            here = self.count == self._stop
            self.hit = name if here else self.hit
            if here and self._error is None and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            if here and self._error is not None and name != "close":
                raise OSError(self._error, os.strerror(self._error))
            try:
                result = real(*arguments, **named)
            finally:
                if here and self._error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
            if here and self._error is not None:
                raise OSError(self._error, os.strerror(self._error))
            return result

        return call
