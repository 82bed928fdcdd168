"""Opening a store: find its two halves, take the locks, sweep what a dead process left, and say what was lost."""

from __future__ import annotations

import os
import tempfile
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.adapters import disk, requests
from lora_grpo.adapters.archive import Archive
from lora_grpo.adapters.catalog import Catalog, link_head
from lora_grpo.adapters.disk import Tree, make_private
from lora_grpo.adapters.journal import Journal
from lora_grpo.adapters.layout import VERSIONS, Identity
from lora_grpo.adapters.locks import WriterLock
from lora_grpo.adapters.numbering import Numbering
from lora_grpo.errors import StoreCorrupt, StoreError

_OWN_NAMES = {
    "store.json", ".store.json.new", "LOCK", "NUMBERS", ".NUMBERS.new", "HEAD", ".HEAD.new", "journal.jsonl",
    "versions", "staging", "trash",
}  # fmt: skip
_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Recovered:
    """What opening found.

    `lost`: versions that were on tmpfs only when it went (or were deleted by another program); `lost_states`: trainer
    states not yet written when their process died; `damaged`: versions that differ from what was published (opening
    reads only `HEAD` and those still to be archived; `verify` reads the others); `damaged_lines`: lines of the journal
    that cannot be read, counted from 1, with the metrics, pins or promotions that they held; `swept`: half-written or
    half-removed folders that were deleted; `unarchived`: versions now queued for the archive; `head_moved`:
    (promoted before, `HEAD` now) where the promoted version was lost or damaged.
    """

    lost: tuple[int, ...] = ()
    lost_states: tuple[int, ...] = ()
    damaged: tuple[int, ...] = ()
    damaged_lines: tuple[int, ...] = ()
    swept: tuple[str, ...] = ()
    unarchived: tuple[int, ...] = ()
    head_moved: tuple[int, int | None] | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """The two halves of a store. `temporary`: the root was chosen by the store, nobody else knows it by name."""

    root: Path
    run: Path | None
    temporary: bool

    @property
    def journal(self) -> Path:
        return (self.run or self.root) / "journal.jsonl"


def for_reading(root: str | Path | None, archive: str | Path | None) -> Places:
    """Find an existing store, by either half."""
    run = None if archive is None else Path(archive).resolve()
    identity = None if run is None else Identity.read(run)
    if root is None:
        if identity is None or identity.other is None:
            raise StoreError(f"there is no store in {run}" if run else "name the store's root or its run directory")
        return Places(Path(identity.other), run, False)
    found = Path(root).resolve()
    identity = Identity.read(found)
    if identity is None and run is None:
        raise StoreError(f"there is no store in {found}")
    if run is None and identity is not None and identity.other is not None:
        run = Path(identity.other)
    return Places(found, run, False)


def catalog_for_reading(root: str | Path | None, archive: str | Path | None) -> Catalog:
    """The catalog of an existing store, of which nothing is changed, not even to mend it."""
    places = for_reading(root, archive)
    kept = None if places.run is None else Archive(places.run)
    return Catalog(Tree(places.root, (VERSIONS,), sync=False), kept, Journal(places.journal, sync=False))


def for_writing(root: str | Path | None, archive: str | Path | None, lock: WriterLock) -> Places:
    """Find or create both halves, each locked before anything in it is believed or changed."""
    run = None if archive is None else Path(archive).resolve()
    with disk.reported(f"opening the run directory {run}" if run else "opening a store"):
        if run is not None:
            run.mkdir(parents=True, exist_ok=True)
            lock.take(run)
        identity = None if run is None else Identity.read(run)
        chosen, temporary = _choose_root(root, run, identity)
        make_private(chosen)
        _refuse_foreign(chosen)
        lock.take(chosen)
        _refuse_other_run(chosen, run, identity)
    return Places(chosen, run, temporary)


def _choose_root(root: str | Path | None, run: Path | None, identity: Identity | None) -> tuple[Path, bool]:
    before = None if identity is None or identity.other is None else Path(identity.other)
    if root is None and before is not None and identity is not None:
        return before, identity.own_root
    if root is None:
        label = "" if run is None else f"{run.name}-"
        parent = _SHM if _SHM.is_dir() else Path(tempfile.gettempdir())
        return Path(tempfile.mkdtemp(prefix=f"lora-grpo-{label}", dir=parent)), True
    chosen = Path(root).resolve()
    if before is not None and before != chosen and identity is not None:
        there = Identity.read(before)
        if there is not None and (there.run_id, there.other) == (identity.run_id, str(run)):
            raise StoreError(f"the versions of {run} are in {before}: open it with that root, or without root=")
    return chosen, False


def _refuse_foreign(root: Path) -> None:
    if Identity.read(root) is None and (foreign := set(os.listdir(root)) - _OWN_NAMES):
        raise StoreError(f"{root} holds no store but {sorted(foreign)[:3]}; give the store a folder of its own")


def _refuse_other_run(root: Path, run: Path | None, identity: Identity | None) -> None:
    there = Identity.read(root)
    if there is None:
        return
    if run is None and there.other is not None:
        raise StoreError(f"{root} belongs to the run in {there.other}: open it with archive={there.other!r}")
    adopted = identity is None and there.other is None
    if run is not None and not adopted and (identity is None or identity.run_id != there.run_id):
        raise StoreError(
            f"{root} holds versions of another run ({there.other or 'one without an archive'}), not of {run}; "
            "choose another root, or remove that folder if its versions are no longer needed"
        )


def warn_unless_tmpfs(root: Path) -> None:
    kind = disk.file_system(root)
    if kind not in ("tmpfs", "ramfs"):
        warnings.warn(
            f"the store's root {root} is on {kind}, not on tmpfs: every publish and load waits for that disk "
            "(each version is written with fsync), where tmpfs takes milliseconds; use a folder under /dev/shm",
            RuntimeWarning,
            stacklevel=4,
        )


class Opening:
    """The steps from two folders to a store that can be written."""

    def __init__(self, places: Places) -> None:
        self.places = places
        on_disk = disk.file_system(places.root) not in ("tmpfs", "ramfs")
        self.root = Tree(places.root, (VERSIONS,), sync=on_disk)
        self.archive = None if places.run is None else Archive(places.run)
        self.journal = Journal(places.journal, sync=places.run is None and on_disk)
        self.catalog = Catalog(self.root, self.archive, self.journal)
        self._leftovers: list[str] = []
        self._unborn: set[str] = set()
        self._damaged: set[int] = set()

    def prepare(self) -> Numbering:
        """Create what is missing, and find the number to go on from."""
        root, run = self.places.root, self.places.run
        with disk.reported(f"opening the store in {root}"):
            for tree in self._trees():
                tree.create()
                self._leftovers += tree.leftovers()
            self._unborn.update(self.root.leftovers())
            self._move_journal()
            self.journal.open_for_writing()
            before = Identity.read(root)
            known = max([self.journal.last, *self.catalog.numbers()])
            numbering = Numbering(root, run, known=known, root_is_new=before is None, sync=self.root.sync)
            disk.at("open.numbered")
            self._identify(before)
        return numbering

    def _trees(self) -> list[Tree]:
        return [self.root] if self.archive is None else [self.root, self.archive.tree]

    def _move_journal(self) -> None:
        """A root that lived without a run directory brings its history with it."""
        old = self.places.root / "journal.jsonl"
        if self.places.run is None or not old.exists():
            return
        if not self.places.journal.exists():
            disk.replace_file(self.places.journal, old.read_bytes(), sync=True)
        old.unlink()

    def _identify(self, root_before: Identity | None) -> None:
        root, run = self.places.root, self.places.run
        run_before = None if run is None else Identity.read(run)
        known = run_before or root_before
        run_id = known.run_id if known is not None else uuid.uuid4().hex
        for folder, other, before in ((run, root, run_before), (root, run, root_before)):
            identity = Identity(run_id, None if other is None else str(other), self.places.temporary)
            if folder is not None and before != identity:
                identity.write(folder, sync=folder == run or self.root.sync)

    def recover(self) -> Recovered:
        """Settle what a dead process left open; after this, the journal and the folders agree."""
        lost, lost_states = self._settle_versions(), self._settle_states()
        disk.at("open.settled")
        # Only now: a folder left in staging tells a version that never was from one that was lost.
        for tree in self._trees():
            tree.sweep()
        head_moved = self._settle_head()
        unarchived = [n for n in self.root.numbers(VERSIONS) if self.archive is not None and not self.archive.has(n)]
        self._damaged.update(n for n in unarchived if not self._is_sound(n))
        if self.places.run is not None:
            with disk.reported(f"settling what was asked of {self.places.run}"):
                requests.sweep(self.places.run)
        return Recovered(
            lost=tuple(lost),
            lost_states=tuple(lost_states),
            damaged=tuple(sorted(self._damaged)),
            damaged_lines=tuple(self.journal.damaged_lines),
            swept=tuple(self._leftovers),
            unarchived=tuple(n for n in unarchived if n not in self._damaged),
            head_moved=head_moved,
        )

    def _settle_versions(self) -> list[int]:
        present = set(self.catalog.numbers())
        for number in sorted(present - self.journal.published.keys()):
            try:
                manifest = self.catalog.manifest(number)
            except (StoreCorrupt, FileNotFoundError):
                self._damaged.add(number)
                continue
            self.journal.append("publish", **manifest.fields())
        missing = sorted(self.journal.published.keys() - present)
        for number in missing:
            self.journal.append("forget", number)
        return [n for n in missing if f"staging/{VERSIONS}-{disk.folder_name(n)}" not in self._unborn]

    def _settle_states(self) -> list[int]:
        present = set(self.catalog.states())
        for number in sorted(present - self.journal.states):
            self.journal.append("state", number)
        missing = sorted(self.journal.states - present)
        for number in missing:
            self.journal.append("forget_state", number)
        return missing

    def _settle_head(self) -> tuple[int, int | None] | None:
        """Leave `HEAD` on the version promoted last; where that is lost, on the last one before it that is not."""
        link = self.root.path / "HEAD"
        linked = self._linked()
        promoted = [*self.journal.promoted, *([] if linked is None else [linked])]
        for number in dict.fromkeys(reversed(promoted)):
            if not self._bring_to_tmpfs(number):
                continue
            if linked != number:
                link_head(self.root, number)
            if next(reversed(self.journal.promoted), None) != number:
                self.journal.append("promote", number)
            return None if number == promoted[-1] else (promoted[-1], number)
        link.unlink(missing_ok=True)
        return (promoted[-1], None) if promoted else None

    def _linked(self) -> int | None:
        try:
            return self.catalog.head_number() if (self.root.path / "HEAD").is_symlink() else None
        except StoreCorrupt:
            return None

    def _bring_to_tmpfs(self, number: int) -> bool:
        if self.catalog.on_tmpfs(number) and self._is_sound(number):
            return True
        if self.archive is None or not self.archive.has(number):
            return False
        if self.catalog.on_tmpfs(number):
            self.root.remove(VERSIONS, number)
        try:
            self.archive.bring_back(self.catalog.manifest(number), self.root)
        except StoreCorrupt:
            self._damaged.add(number)
            return False
        self._damaged.discard(number)
        return True

    def _is_sound(self, number: int) -> bool:
        try:
            self.catalog.verify_tmpfs(number)
        except (StoreCorrupt, FileNotFoundError):
            self._damaged.add(number)
            return False
        return True
