"""Everything that a writer keeps open, and the work that needs several of its parts: archiving, pruning, room."""

import atexit
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from lora_grpo.adapters.files.disk import STATES, VERSIONS, Files, Tree, file_system, reported
from lora_grpo.adapters.files.journal import Manifest
from lora_grpo.adapters.files.locks import WriterLock, unleased
from lora_grpo.adapters.files.places import ASIDE, MIB, Places, for_writing, lacking, larger
from lora_grpo.adapters.upkeep.archive import Archive, BackgroundWriter, Job
from lora_grpo.adapters.upkeep.opening import Opening
from lora_grpo.adapters.upkeep.retention import Place, Retention, default_retention
from lora_grpo.errors import NoRoom, StoreError, counted


class Session(Opening):
    """A store open for writing, from lock to unlock."""

    def __init__(self, places: Places, lock: WriterLock, retention: Retention | None, backlog_limit_bytes: int) -> None:
        kind = file_system(places.root)
        on_tmpfs = kind in ("tmpfs", "ramfs")
        if not on_tmpfs:
            cost = "every publish and load must wait for the disk; use a folder under /dev/shm"
            told = f"the store's root {places.root} is on {kind}, not on tmpfs: {cost}"
            warnings.warn(told, RuntimeWarning, stacklevel=4)
        super().__init__(places, root_is_tmpfs=on_tmpfs)
        self.lock = lock
        self.retention = retention or default_retention(archived=self.archive is not None)
        self._unwarned = retention is None and self.archive is None
        self.writer = BackgroundWriter(backlog_limit_bytes)
        self._pruned = False
        for number in self.recovered.unarchived:
            self.archive_version(self.manifest(number))

    def require_open(self) -> None:
        if not self.lock.held:
            raise StoreError("this store is closed, or it was opened in the parent process of this one; open it here")
        self.writer.raise_failure()

    def required_archive(self) -> Archive:
        if self.archive is None:
            raise StoreError(f"the store in {self.places.root} has no run directory; open it with archive=")
        return self.archive

    def make_room(self, sizes: Mapping[str, int], budget_bytes: int | None) -> None:
        """Return when files of `sizes` bytes fit root and budget, pruning if they do not; else raise `NoRoom`."""
        if not self._lacking(sizes, budget_bytes):
            return
        self.prune()
        if self._lacking(sizes, budget_bytes) and self.writer.backlog_bytes:
            self.writer.flush()
            self.prune()
        if wanting := self._lacking(sizes, budget_bytes):
            taken, kept = self._used_bytes() / MIB, self.retention.words("tmpfs")
            instead = f"{larger(self.root.path)}{'' if budget_bytes is None else ' or budget_bytes'}"
            stay = f"versions taking {taken:.2f} MiB: tmpfs keeps {kept}, HEAD, pinned and leased ones"
            fix = f"free what else is there, or use retention=keep_latest(2) (a trainer: keep.on_tmpfs=2), or {instead}"
            raise NoRoom(f"a version {wanting}, {stay}; {fix}")

    def _lacking(self, sizes: Mapping[str, int], budget_bytes: int | None) -> str | None:
        wanting, need = lacking(self.root.path, sizes), sum(sizes.values())
        if wanting is None and budget_bytes is not None and need > (room := max(0, budget_bytes - self._used_bytes())):
            return f"needs {need / MIB:.2f} MiB and budget_bytes={budget_bytes} has room for {room / MIB:.2f} MiB"
        return wanting

    def _used_bytes(self) -> int:
        return sum(self.manifest(number).size_bytes for number in self.root.numbers(VERSIONS))

    def archive_version(self, manifest: Manifest) -> None:
        archive, source = self.archive, self.root.folder(VERSIONS, manifest.number)
        if archive is None:
            return

        def copy() -> None:
            with reported(f"making {self.journal.path} durable"):
                # The run's history first, then the bytes.
                self.journal.make_durable()
            archive.keep_version(manifest, source)

        self.writer.submit(Job(VERSIONS, manifest.number, manifest.size_bytes, 0, copy))

    def archive_state(self, number: int, contents: Files) -> None:
        """Queue a trainer state behind its version; in a full queue, states that retention drops anyway make room."""
        archive = self.required_archive()
        # In this order: a copy that is finished in between is seen by the second look.
        if number not in self.writer.pending(VERSIONS) and not archive.has(VERSIONS, number):
            self.archive_version(self.manifest(number))
        size = sum(memoryview(buffer).nbytes for buffers in contents.values() for buffer in buffers)
        if not self.writer.has_room(size):
            self._prune_states(self.writer.pending(STATES), coming=number)
        self.writer.submit(Job(STATES, number, size, size, partial(archive.keep_state, number, contents)))
        self.journal.append("state", number)

    def prune(self) -> list[int]:
        self._pruned = True
        # States first: a kill in between leaves an adapter without its state, never a state without its adapter.
        if self.archive is not None and self.retention.limits("state"):
            self._prune_states(self.writer.pending(STATES).union(self.states()))
        archived = self._archive_keeps()
        removed = self._prune_tmpfs(archived)
        if self.archive is not None and self.retention.limits("archive"):
            for number in sorted({*self.archive.numbers(VERSIONS)} - archived):
                if not self.on_tmpfs(number):
                    self.journal.append("forget", number, why=f"the archive keeps {self.retention.words('archive')}")
                self._remove(self.archive, VERSIONS, number)
        return removed

    def remove_from_tmpfs(self, number: int, *, survives: bool) -> bool:
        """Remove the tmpfs copy; False when somebody leases it. `survives`: the archive has another."""
        with unleased(self.root.folder(VERSIONS, number)) as free:
            if free:
                if not survives:
                    self._warn_once(number)
                    self.journal.append("forget", number, why=f"tmpfs keeps {self.retention.words('tmpfs')}")
                self.root.remove(VERSIONS, number)
        return free

    def close(self) -> None:
        if not self.lock.held:
            return
        try:
            with closing(self.writer):
                if self._pruned and self.archive is not None:
                    # What had to wait for the disk when a prune wanted it gone can go now.
                    self.writer.flush()
                    self.prune()
            if self.archive is not None:
                self._prune_tmpfs(self._archive_keeps())
            self.numbering.give_back()
            if self.places.temporary:
                self._clear_root()
        finally:
            self.numbering.close()
            self.journal.close()
            self.leases.close()
            self.lock.close()
        if self.archive is None and self.places.temporary and self.root.path.exists():
            atexit.register(_clear_at_exit, self.root, os.getpid())

    def _warn_once(self, number: int) -> None:
        if self._unwarned:
            self._unwarned = False
            kept = f"it keeps {self.retention.words('tmpfs')}; archive=DIR or retention=Retention() keeps every version"
            told = f"the store in {self.root.path} has no archive, and removes version {number} for good: {kept}"
            warnings.warn(told, RuntimeWarning, stacklevel=6)

    def _archive_keeps(self) -> set[int]:
        """What is to be in the archive: what its rules keep, and the adapter of every trainer state."""
        if self.archive is None:
            return set()
        if not self.retention.limits("archive"):
            # Everything; listing an archive that only grows would make every prune slower than the last one.
            return {*self.root.numbers(VERSIONS)}
        durable = {*self.archive.numbers(VERSIONS)} - self.writer.pending(VERSIONS)
        return self._kept("archive", {*self.numbers()}, durable).union(self.writer.pending(STATES), self.states())

    def _kept(self, place: Place, numbers: set[int], durable: set[int]) -> set[int]:
        """What retention keeps of `numbers`, and of `durable`, those on the disk: a kill takes the queue with it."""
        return self.kept(self.retention, place, numbers) | self.kept(self.retention, place, durable)

    def _prune_tmpfs(self, durable: set[int]) -> list[int]:
        here = self.root.numbers(VERSIONS)
        removed, pending = [], self.writer.pending(VERSIONS)
        for number in sorted({*here} - self.kept(self.retention, "tmpfs", here)):
            archived = number not in pending and self.in_archive(number)
            # What the archive wants and does not have yet stays; what it does not want need not be written.
            going = archived if number in durable else self.writer.cancel(VERSIONS, number)
            if going and self.remove_from_tmpfs(number, survives=archived):
                removed.append(number)
        return removed

    def _prune_states(self, numbers: set[int], *, coming: int | None = None) -> None:
        archive = self.required_archive()
        queued = self.writer.pending(STATES) | ({coming} if coming is not None else set())
        durable = {*archive.numbers(STATES)} - queued
        for number in sorted(numbers - self._kept("state", queued | durable, durable)):
            if self.writer.cancel(STATES, number):
                self.journal.append("forget_state", number)
                if archive.has(STATES, number):
                    self._remove(archive, STATES, number)

    def _remove(self, archive: Archive, kind: str, number: int) -> None:
        """Take an archived folder away at once; waiting for the disk is left to the archive thread."""
        self.writer.submit(Job("trash", number, 0, 0, partial(archive.delete, kind, archive.take_out(kind, number))))

    def _clear_root(self) -> None:
        """Remove a root that only this store knows; what is archived comes back there when the run is opened again."""
        here, self._unwarned = self.root.numbers(VERSIONS), False
        if here and self.archive is None:
            fix = "archive=DIR keeps versions on disk, a root= of your own on tmpfs"
            gone = f"its {counted(len(here), 'version')} removed for good: {fix}"
            warnings.warn(f"the store in {self.root.path} is closed, and {gone}", RuntimeWarning, stacklevel=4)
        for number in here:
            self.remove_from_tmpfs(number, survives=self.in_archive(number))
        if not self.root.numbers(VERSIONS) and not any(self.root.path.glob(f"{ASIDE}*")):
            shutil.rmtree(self.root.path)


def open_session(
    root: str | Path | None, archive: str | Path | None, retention: Retention | None, backlog_limit_bytes: int
) -> Session:
    lock = WriterLock()
    try:
        with reported(f"opening the run directory {archive}" if archive else f"opening the store in {root}"):
            return Session(for_writing(root, archive, lock), lock, retention, backlog_limit_bytes)
    except BaseException:
        lock.close()
        raise


def _clear_at_exit(root: Tree, process: int) -> None:
    """Remove what an engine of this process could still read when its store was closed, unless others read it."""
    lock = WriterLock()
    with suppress(OSError), closing(lock):
        if os.getpid() != process:
            return  # a forked child
        lock.take(root.path)
        for number in root.numbers(VERSIONS):
            with unleased(root.folder(VERSIONS, number)) as free:
                if free:
                    root.remove(VERSIONS, number)
        if not root.numbers(VERSIONS):
            shutil.rmtree(root.path)
