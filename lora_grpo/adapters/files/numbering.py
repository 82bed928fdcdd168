"""Version numbers that never come back.

The root's `NUMBERS` holds the last number given out, updated at every publish. The run directory's holds a bound that
was made durable before any number up to it was given out; after a reboot numbering goes on above that bound.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_grpo.adapters.files import disk

BLOCK = 64
_WIDTH = 20


class Numbering:
    """Gives out numbers. Without a run directory, they are remembered for the life of the tmpfs only."""

    def __init__(self, root: Path, run: Path | None, *, known: int, root_is_new: bool, sync: bool) -> None:
        """`known` is the largest number seen anywhere; a new root has no count of its own to go on from."""
        self._run_file = None if run is None else run / "NUMBERS"
        self._bound = 0 if self._run_file is None else disk.read_number(self._run_file) or 0
        counted = disk.read_number(root / "NUMBERS")
        trusted = counted is not None and not root_is_new
        self.last = max(counted or 0, known, 0 if trusted else self._bound)
        self._sync = sync
        if counted is None:
            disk.replace_file(root / "NUMBERS", self._text(), sync=sync)
        self._descriptor = os.open(root / "NUMBERS", os.O_WRONLY)
        self._write_last()

    def next(self) -> int:
        """The next number. Given out once, whatever becomes of it."""
        number = self.last + 1
        if self._run_file is not None and number > self._bound:
            self._reserve(number + BLOCK - 1)
        self.last = number
        self._write_last()
        return number

    def give_back(self) -> None:
        """Return what was reserved and not given out, so that a clean stop leaves no gap."""
        if self._run_file is not None and self._bound > self.last:
            self._reserve(self.last)

    def close(self) -> None:
        os.close(self._descriptor)

    def _text(self) -> bytes:
        return f"{self.last:0{_WIDTH}d}\n".encode()

    def _reserve(self, bound: int) -> None:
        assert self._run_file is not None
        disk.replace_file(self._run_file, f"{bound}\n".encode(), sync=True)
        self._bound = bound

    def _write_last(self) -> None:
        # In place and of fixed width: one page that is already there, so a full tmpfs cannot refuse it.
        os.pwrite(self._descriptor, self._text(), 0)
        if self._sync:
            os.fsync(self._descriptor)
