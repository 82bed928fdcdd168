"""Whether a version fits, found out before a byte is written."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from lora_grpo.adapters.files.disk import PAGE_BYTES, shm_size
from lora_grpo.adapters.files.layout import VERSIONS
from lora_grpo.adapters.upkeep.session import Session
from lora_grpo.errors import NoRoom

MIB = 1 << 20


def make_room(session: Session, sizes: Mapping[str, int], budget_bytes: int | None) -> None:
    """Return when files of `sizes` bytes fit the root and the budget, pruning if they do not; else raise `NoRoom`."""
    if not _lacking(session, sizes, budget_bytes):
        return
    session.prune()
    if _lacking(session, sizes, budget_bytes) and session.writer.backlog_bytes:
        session.writer.flush()
        session.prune()
    if lacking := _lacking(session, sizes, budget_bytes):
        taken, kept = _used_bytes(session) / MIB, session.retention.words("tmpfs")
        larger = f"{_larger(session.root.path)}{'' if budget_bytes is None else ' or budget_bytes'}"
        stay = f"versions taking {taken:.2f} MiB: tmpfs keeps {kept}, HEAD, pinned and leased ones"
        fix = f"free what else is there, or use retention=keep_latest(2) (a trainer: keep.on_tmpfs=2), or {larger}"
        raise NoRoom(f"a version {lacking}, {stay}; {fix}")


def _lacking(session: Session, sizes: Mapping[str, int], budget_bytes: int | None) -> str | None:
    lacking = _lacking_in(session.root.path, sizes)
    if lacking is not None or budget_bytes is None:
        return lacking
    need, used = sum(sizes.values()), _used_bytes(session)
    if used + need <= budget_bytes:
        return None
    room = max(0, budget_bytes - used) / MIB
    return f"needs {need / MIB:.2f} MiB and budget_bytes={budget_bytes} has room for {room:.2f} MiB"


def _used_bytes(session: Session) -> int:
    return sum(session.manifest(number).size_bytes for number in session.root.numbers(VERSIONS))


def require_room(folder: Path, sizes: Mapping[str, int], what: str) -> None:
    """Raise `NoRoom` when files of `sizes` bytes, which `what` names, do not fit the file system of `folder`."""
    if lacking := _lacking_in(folder, sizes):
        raise NoRoom(f"{what} {lacking}: free some of it, or use {_larger(folder)}")


def require_kept(root: Path, versions: int, size_bytes: int) -> str:
    """What it is that fits a store's `root`, which need not be there yet: `versions` of `size_bytes` each, and one that
    is being written; those that it holds already take nothing more. Raises `NoRoom` where they do not fit."""
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
    # Beyond the files' own, for the manifest and the folder's bookkeeping: 3.
    pages = 3 + sum(-(-size // PAGE_BYTES) for size in sizes.values())
    need, there = pages * PAGE_BYTES, shutil.disk_usage(folder)
    if need <= there.free:
        return None
    room, size = there.free / MIB, there.total / MIB
    return f"needs {need / MIB:.2f} MiB and {folder} has room for {room:.2f} MiB of {size:.0f} MiB"
