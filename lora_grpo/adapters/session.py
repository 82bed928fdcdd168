"""Everything that a writer keeps open, and the work that needs several of its parts: archiving and pruning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_grpo.adapters import disk
from lora_grpo.adapters.archive import Archive
from lora_grpo.adapters.digest import Buffer
from lora_grpo.adapters.journal import Journal
from lora_grpo.adapters.layout import STATES, VERSIONS, Manifest
from lora_grpo.adapters.locks import Leases, WriterLock, unleased
from lora_grpo.adapters.opening import Opening, for_writing, warn_unless_tmpfs
from lora_grpo.adapters.retention import Retention
from lora_grpo.adapters.writer import BackgroundWriter, Job
from lora_grpo.errors import StoreError

TRASH = "trash"
"""The kind of the archive thread's jobs that delete."""


class Session:
    """A store open for writing, from lock to unlock."""

    def __init__(self, opening: Opening, lock: WriterLock, retention: Retention, backlog_limit_bytes: int) -> None:
        self.places = opening.places
        self.root, self.archive = opening.root, opening.archive
        self.journal, self.catalog = opening.journal, opening.catalog
        self.lock = lock
        self.leases = Leases()
        self.retention = retention
        self.writer = BackgroundWriter(backlog_limit_bytes)
        self.numbering = opening.prepare()
        self.recovered = opening.recover()
        self._process = os.getpid()
        self._late: dict[str, set[int]] = {VERSIONS: set(), STATES: set()}
        for number in self.recovered.unarchived:
            self.archive_version(self.catalog.manifest(number))

    def require_open(self) -> None:
        """Raise what the archive thread could not do, and for a store that is closed or belongs to a parent process."""
        if not self.lock.held:
            raise StoreError("this store is closed, or was opened by the process that this one was forked from")
        self.writer.raise_failure()

    def protected(self) -> set[int]:
        """Versions that no retention removes: the pinned ones and `HEAD`."""
        head = self.catalog.head_number()
        return self.journal.pins | ({head} if head is not None else set())

    def required_archive(self) -> Archive:
        if self.archive is None:
            raise StoreError(f"the store in {self.places.root} has no run directory; open it with archive=")
        return self.archive

    def archive_version(self, manifest: Manifest) -> None:
        """Queue the durable copy of a version."""
        if self.archive is None:
            return
        source = self.root.folder(VERSIONS, manifest.number)
        copy = partial(_archive_version, self.archive, self.journal, manifest, source)
        self.writer.submit(Job(VERSIONS, manifest.number, manifest.size_bytes, 0, copy))

    def archive_state(self, number: int, contents: Mapping[str, Sequence[Buffer]]) -> None:
        """Queue a trainer state; when the queue is full, states that retention would drop anyway leave it first."""
        archive = self.required_archive()
        size = sum(memoryview(buffer).nbytes for buffers in contents.values() for buffer in buffers)
        if not self.writer.has_room(size):
            self._prune_states(self.writer.pending(STATES), coming=number)
        self.writer.submit(Job(STATES, number, size, size, partial(archive.keep_state, number, contents)))
        self.journal.append("state", number)

    def prune(self) -> list[int]:
        """Apply retention to tmpfs, archive and trainer states; the numbers whose tmpfs copy went."""
        durable = self._archive_keeps()
        removed = self._prune_tmpfs(durable)
        if self.archive is not None:
            if self.retention.limits("archive"):
                self._prune_archive(self.archive, durable)
            if self.retention.limits("state"):
                self._prune_states({*self.catalog.states(), *self.writer.pending(STATES)})
        return removed

    def remove_from_tmpfs(self, number: int, *, survives: bool) -> bool:
        """Remove the tmpfs copy; False when somebody leases it. `survives`: the archive has another."""
        with unleased(self.root.folder(VERSIONS, number)) as free:
            if free:
                if not survives:
                    self.journal.append("forget", number)
                disk.at("prune.journaled")
                self.root.remove(VERSIONS, number)
                disk.at("prune.removed")
        return free

    def close(self) -> None:
        """Finish the archive, give numbers back, clear a root of the store's own choosing, unlock."""
        if not self.lock.held or os.getpid() != self._process:
            return
        try:
            try:
                self._prune_late()
            finally:
                self.writer.close()
            self.numbering.give_back()
            if self.places.temporary:
                self._clear_root()
        finally:
            self.numbering.close()
            self.journal.close()
            self.leases.close()
            self.lock.release()

    def _archive_keeps(self) -> Callable[[int], bool]:
        """Whether a version is to be in the archive, by its number."""
        if self.archive is None:
            return lambda number: False
        if not self.retention.limits("archive"):
            return lambda number: True
        kept = self.retention.kept("archive", self.catalog.candidates(self.catalog.numbers()))
        return (kept | self.protected()).__contains__

    def _prune_tmpfs(self, durable: Callable[[int], bool]) -> list[int]:
        here = self.root.numbers(VERSIONS)
        keep = self.retention.kept("tmpfs", self.catalog.candidates(here)) | self.protected()
        removed, pending = [], self.writer.pending(VERSIONS)
        for number in (n for n in here if n not in keep):
            archived = self.catalog.in_archive(number) and number not in pending
            # What the archive wants and does not have yet stays; what it does not want need not be written.
            going = archived if durable(number) else self.writer.cancel(VERSIONS, number)
            if (going or self.archive is None) and self.remove_from_tmpfs(number, survives=archived):
                removed.append(number)
        return removed

    def _prune_archive(self, archive: Archive, durable: Callable[[int], bool]) -> None:
        self._late[VERSIONS] |= {number for number in self.writer.pending(VERSIONS) if not durable(number)}
        for number in archive.tree.numbers(VERSIONS):
            if durable(number):
                continue
            if not self.catalog.on_tmpfs(number):
                self.journal.append("forget", number)
            self._remove(archive, VERSIONS, number)
            disk.at("prune.unarchived")

    def _prune_states(self, numbers: set[int], *, coming: int | None = None) -> None:
        archive = self.required_archive()
        known = {*archive.tree.numbers(STATES), *self.writer.pending(STATES)}
        if coming is not None:
            known.add(coming)
        keep = self.retention.kept("state", self.catalog.candidates(sorted(known))) | self.protected()
        for number in sorted(numbers - keep):
            if not self.writer.cancel(STATES, number):
                self._late[STATES].add(number)
                continue
            self.journal.append("forget_state", number)
            if archive.tree.has(STATES, number):
                self._remove(archive, STATES, number)
                disk.at("prune.state")

    def _prune_late(self) -> None:
        """Remove what was on its way to the disk when a prune wanted it gone, where the rules still say so."""
        if self.archive is None or not any(self._late.values()):
            return
        self.writer.flush()
        durable = self._archive_keeps()
        self._prune_archive(self.archive, lambda number: number not in self._late[VERSIONS] or durable(number))
        self._prune_states(self._late[STATES].intersection(self.catalog.states()))

    def _remove(self, archive: Archive, kind: str, number: int) -> None:
        """Take an archived folder away at once; waiting for the disk is left to the archive thread."""
        trash = archive.tree.take_out(kind, number)
        self.writer.submit(Job(TRASH, number, 0, 0, partial(_delete, archive, kind, trash)))

    def _clear_root(self) -> None:
        """Remove a root that only this store knows; what is archived comes back there when the run is opened again."""
        for number in self.root.numbers(VERSIONS):
            self.remove_from_tmpfs(number, survives=self.catalog.in_archive(number))
        if not self.root.numbers(VERSIONS):
            shutil.rmtree(self.root.path)


def open_session(
    root: str | Path | None, archive: str | Path | None, retention: Retention, backlog_limit_bytes: int
) -> Session:
    """Lock, sweep, recover; on any failure the locks are given back."""
    lock = WriterLock()
    try:
        places = for_writing(root, archive, lock)
        warn_unless_tmpfs(places.root)
        return Session(Opening(places), lock, retention, backlog_limit_bytes)
    except BaseException:
        lock.release()
        raise


def _delete(archive: Archive, kind: str, trash: Path) -> None:
    with disk.reported(f"deleting {trash}"):
        archive.tree.delete(kind, trash)


def _archive_version(archive: Archive, journal: Journal, manifest: Manifest, source: Path) -> None:
    """The archive thread's work for one version: the run's history first, then the bytes."""
    with disk.reported(f"making {journal.path} durable"):
        journal.make_durable()
    archive.keep_version(manifest, source)
