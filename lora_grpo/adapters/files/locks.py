"""Who may write, and what may not be removed: both are kernel locks, so a dead process holds neither.

A forked child inherits descriptors and with them `flock` locks; ours are closed in the child, so that an engine
worker that outlives its parent does not keep the run locked."""

import fcntl
import os
import shutil
import socket
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lora_grpo.adapters.files.disk import open_regular, reported
from lora_grpo.adapters.version import MANIFEST_FILE
from lora_grpo.errors import StoreLocked, UnknownVersion

PATIENCE_S = 0.2  # of a writer: another process that only asks who holds a lock takes it for microseconds


def holder(folder: str | Path) -> str | None:
    """Who has the store in `folder` (a root or a run directory) open for writing, and since when."""
    lock = Path(folder) / "LOCK"
    with reported(f"looking who holds {folder}"), suppress(FileNotFoundError), open(open_regular(lock), "rb") as held:
        return None if _try_lock(held.fileno(), fcntl.LOCK_SH) else _named_in(held.fileno())
    return None


def _named_in(descriptor: int) -> str:
    return os.pread(descriptor, 300, 0).decode("ascii", "backslashreplace") or "a process that has just begun"


class _Descriptors:
    def __init__(self) -> None:
        self.by_key: dict[Path | int, int] = {}
        _ALL.add(self)

    def close(self) -> None:
        for descriptor in self.by_key.values():
            os.close(descriptor)
        self.by_key.clear()


_ALL: weakref.WeakSet[_Descriptors] = weakref.WeakSet()


def _close_in_child() -> None:
    for descriptors in list(_ALL):
        descriptors.close()


os.register_at_fork(after_in_child=_close_in_child)


class WriterLock(_Descriptors):
    """The right to write below some folders; taken whole or not at all."""

    @property
    def held(self) -> bool:
        return bool(self.by_key)

    def take(self, folder: Path) -> None:
        descriptor = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    who, fix = _named_in(descriptor), "stop that process, or open the store with readonly=True"
                    raise StoreLocked(f"{folder} is open for writing in {who}; {fix}")
                time.sleep(0.005)
            name = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, name.encode("ascii", "backslashreplace"), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self.by_key[folder] = descriptor


def _try_lock(descriptor: int, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    return False


class OwnFolder:
    """A folder of this process alone, locked for as long as it lives, so that what dead ones left can be told."""

    def __init__(self, parent: Path, prefix: str) -> None:
        """Make it in `parent`, by a name that begins with `prefix`, which no other kind of folder there may have."""
        self._lock = WriterLock()
        # Hidden until it is locked, so that nobody ever takes it for a dead process's.
        hidden = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        self._lock.take(hidden)
        self.path = parent / hidden.name[1:]
        os.rename(hidden, self.path)

    def close(self) -> None:
        """Remove it; a forked child, which holds no lock, leaves it alone."""
        if self._lock.held:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()

    @staticmethod
    def sweep(parent: Path, prefix: str) -> None:
        for lock in parent.glob(f"{prefix}*/LOCK"):
            if is_free(lock.parent):
                shutil.rmtree(lock.parent, ignore_errors=True)


def is_free(folder: Path) -> bool:
    """Whether no process holds the folder; another user's is not ours to judge, nor to read."""
    try:
        return folder.lstat().st_uid == os.geteuid() and holder(folder) is None
    except FileNotFoundError:
        return True
    except OSError:
        return False


class Leases(_Descriptors):
    """Versions that this process needs on tmpfs: a shared lock on each one's manifest, counted."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[int] = Counter()

    def acquire(self, number: int, folder: Path) -> None:
        if number not in self.by_key:
            self.by_key[number] = _lock_in_place(number, folder / MANIFEST_FILE)
        self._counts[number] += 1

    def release(self, number: int) -> None:
        if number not in self.by_key:
            raise UnknownVersion(f"version {number} is not leased here; call acquire() once before each release()")
        self._counts[number] -= 1
        if not self._counts[number]:
            os.close(self.by_key.pop(number))

    def close(self) -> None:
        self._counts.clear()
        super().close()


def _lock_in_place(number: int, path: Path) -> int:
    with reported(f"leasing version {number}"), suppress(FileNotFoundError), ExitStack() as undo:
        descriptor = open_regular(path)
        undo.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Whoever removes a version locks its manifest first: still being at its path now means staying there.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            undo.pop_all()
            return descriptor
    raise UnknownVersion(f"version {number} was removed from tmpfs just now; store.restore({number}) brings it back")


def is_leased(folder: Path) -> bool:
    with unleased(folder) as free:
        return not free


@contextmanager
def unleased(folder: Path) -> Iterator[bool]:
    """Whether nobody leases the version in `folder`; while the block runs, nobody can begin to."""
    try:
        descriptor = open_regular(folder / MANIFEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        yield True
        return
    with open(descriptor, "rb"):
        yield _try_lock(descriptor, fcntl.LOCK_EX)
