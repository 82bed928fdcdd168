"""Whether a version fits, found out before a byte is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from lora_grpo.adapters.files.catalog import Catalog
from lora_grpo.adapters.files.disk import PAGE_BYTES, shm_size
from lora_grpo.adapters.upkeep.session import Session
from lora_grpo.errors import NoRoom

MIB = 1 << 20
_MANIFEST_PAGES = 3
"""Pages beyond the files' own: the manifest, and the folder's bookkeeping."""


class Room:
    """Room on the root's file system, and in the byte budget."""

    def __init__(self, catalog: Catalog, budget_bytes: int | None) -> None:
        self._catalog = catalog
        self._budget_bytes = budget_bytes

    def make(self, sizes: Mapping[str, int], session: Session) -> None:
        """Return when files of `sizes` bytes fit, pruning if they do not at first; else raise `NoRoom`."""
        advice = (
            f"tmpfs keeps {session.retention.words('tmpfs')}, HEAD, pinned and leased versions; open the store with a "
            "retention that keeps fewer, such as retention=keep_latest(2) (a trainer: keep.on_tmpfs=2)"
        )
        if self._lacking(sizes, advice) is None:
            return
        session.prune()
        if self._lacking(sizes, advice) is not None and session.writer.backlog_bytes:
            session.writer.flush()
            session.prune()
        lacking = self._lacking(sizes, advice)
        if lacking is not None:
            raise NoRoom(lacking)

    def _lacking(self, sizes: Mapping[str, int], advice: str) -> str | None:
        root = self._catalog.root.path
        lacking = _lacking_in(root, sizes)
        if lacking is not None:
            return f"a version {lacking}: {advice}, or {_larger(root)}"
        if self._budget_bytes is None:
            return None
        need, used = sum(sizes.values()), self._catalog.tmpfs_bytes()
        if used + need > self._budget_bytes:
            return (
                f"a version needs {need / MIB:.2f} MiB and budget_bytes={self._budget_bytes} has room for "
                f"{max(0, self._budget_bytes - used) / MIB:.2f} MiB, versions in {root} taking {used / MIB:.2f} MiB: "
                f"{advice}, or a larger budget within {root}{shm_size(root)}"
            )
        return None


def require_room(folder: Path, sizes: Mapping[str, int], what: str) -> None:
    """Raise `NoRoom` when files of `sizes` bytes, which `what` names, do not fit the file system of `folder`."""
    lacking = _lacking_in(folder, sizes)
    if lacking is not None:
        raise NoRoom(f"{what} {lacking}: free some of it, or use {_larger(folder)}")


def require_kept(root: Path, versions: int, size_bytes: int) -> str:
    """What it is that fits a store's `root`, which need not be there yet: `versions` of `size_bytes` each, and one that
    is being written; those that it holds already take nothing more. Raises `NoRoom` where they do not fit.
    """
    folder = next(one for one in (root, *root.parents) if one.is_dir())
    more = max(1, versions + 1 - len(list(root.glob("versions/*"))))
    what = f"keeping {versions} versions (keep.on_tmpfs, and one more that is being written)"
    try:
        require_room(folder, dict.fromkeys(map(str, range(more)), size_bytes), what)
    except NoRoom as error:
        raise NoRoom(f"{error}, or lower keep.on_tmpfs") from None
    free = shutil.disk_usage(folder).free / MIB
    return f"{versions} + 1 versions of {size_bytes / MIB:,.2f} MiB; {free:,.0f} MiB are free in {folder}"


def _larger(folder: Path) -> str:
    return f"a larger tmpfs{size}" if (size := shm_size(folder)) else "a larger file system"


def _lacking_in(folder: Path, sizes: Mapping[str, int]) -> str | None:
    pages = _MANIFEST_PAGES + sum(-(-size // PAGE_BYTES) for size in sizes.values())
    need, there = pages * PAGE_BYTES, shutil.disk_usage(folder)
    if need <= there.free:
        return None
    room, size = there.free / MIB, there.total / MIB
    return f"needs {need / MIB:.2f} MiB and {folder} has room for {room:.2f} MiB of {size:.0f} MiB"
