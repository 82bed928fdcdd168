"""Opening a store: find its two halves, take the locks, sweep what a dead process left, and say what was lost."""

import os
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lora_grpo.adapters.asking import requests
from lora_grpo.adapters.files.catalog import Catalog, link_head
from lora_grpo.adapters.files.disk import VERSIONS, folder_name, read_number, replace_file
from lora_grpo.adapters.files.journal import read_manifest
from lora_grpo.adapters.files.places import ASIDE, Identity, Places
from lora_grpo.adapters.upkeep.archive import Archive
from lora_grpo.errors import StoreCorrupt

_BLOCK = 64  # numbers that are reserved at a time
_TEMPORARIES = [f".{name}.new" for name in ("HEAD", "store.json", "NUMBERS", "journal.jsonl", "rollbacks.jsonl")]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What opening found. `lost`: versions that were on tmpfs only when it went (or were deleted by another program);
    `lost_states`: trainer states not yet written when their process died; `damaged`: versions that differ from what was
    published (opening reads only `HEAD` and those still to be archived; `verify` reads the others); `damaged_lines`:
    lines of the journal that cannot be read, counted from 1, with the metrics, pins or promotions that they held;
    `swept`: half-written or half-removed folders that were deleted; `unarchived`: versions now queued for the archive;
    `head_moved`: (promoted before, `HEAD` now) where the promoted version was lost or damaged; `copied_from`: the run
    directory that this one is a copy of; `set_aside`: folders with what the archive has not got of a root that was out
    of date, since the run was opened with another one meanwhile (yours to remove)."""

    lost: tuple[int, ...] = ()
    lost_states: tuple[int, ...] = ()
    damaged: tuple[int, ...] = ()
    damaged_lines: tuple[int, ...] = ()
    swept: tuple[str, ...] = ()
    unarchived: tuple[int, ...] = ()
    head_moved: tuple[int, int | None] | None = None
    copied_from: Path | None = None
    set_aside: tuple[Path, ...] = ()


class Numbering:
    """Gives out numbers that never come back. The root's `NUMBERS` holds the last one given out, the run directory's a
    bound made durable before any number up to it was; after a reboot numbering goes on above that bound."""

    def __init__(self, places: Places, *, known: int, root_is_new: bool, sync: bool) -> None:
        """`known` is the largest number seen anywhere; a new root has no count of its own to go on from."""
        root_file = places.root / "NUMBERS"
        self._run_file = None if places.run is None else places.run / "NUMBERS"
        self._bound = 0 if self._run_file is None else read_number(self._run_file) or 0
        counted = read_number(root_file)
        trusted = counted is not None and not root_is_new
        self.last = max(counted or 0, known, 0 if trusted else self._bound)
        self._sync = sync
        if counted is None:
            replace_file(root_file, self._text(), sync=sync)
        self._descriptor = os.open(root_file, os.O_WRONLY)
        self._write_last()

    def next(self) -> int:
        if self.last >= self._bound:
            self._reserve(self.last + _BLOCK)
        self.last += 1
        self._write_last()
        return self.last

    def give_back(self) -> None:
        """Return what was reserved and not given out, so that a clean stop leaves no gap."""
        if self._bound > self.last:
            self._reserve(self.last)

    def close(self) -> None:
        os.close(self._descriptor)

    def _text(self) -> bytes:
        return f"{self.last:020d}\n".encode()

    def _reserve(self, bound: int) -> None:
        if self._run_file is not None:
            replace_file(self._run_file, f"{bound}\n".encode(), sync=True)
            self._bound = bound

    def _write_last(self) -> None:
        # In place and of fixed width: one page that is already there, so a full tmpfs cannot refuse it.
        os.pwrite(self._descriptor, self._text(), 0)
        if self._sync:
            os.fsync(self._descriptor)


class Opening(Catalog):
    """A catalog that is made whole: after this, the journal and the folders agree."""

    def __init__(self, places: Places, *, root_is_tmpfs: bool) -> None:
        super().__init__(places, root_is_tmpfs=root_is_tmpfs)
        self._damaged: set[int] = set()
        for tree in self.trees:
            tree.create()
        run, before = Identity.read(self.places.run), Identity.read(self.places.root)
        if self.archive is not None and run is not None and before is not None and before.is_older_than(run):
            self._set_aside(self.archive)
            before = None
        old = self.places.root / "journal.jsonl"
        if self.places.run is not None and old.exists():
            # A root that lived without a run directory brings its history with it.
            if not self.places.journal.exists():
                replace_file(self.places.journal, old.read_bytes(), sync=True)
            old.unlink()
        self.journal.open_for_writing()
        names = [number for tree in self.trees for number in tree.numbers(VERSIONS, folders_only=False)]
        known = max([0, *self.journal.parents, *names])
        self.numbering = Numbering(self.places, known=known, root_is_new=before is None, sync=self.root.sync)
        self._identify(before)
        self.recovered = self._recover()

    def _set_aside(self, archive: Archive) -> None:
        """Empty a root that is out of date, `store.json` last: a kill in between has the next opening go on with it."""
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.places.root))
        (aside / VERSIONS).mkdir()
        for number in self.root.numbers(VERSIONS):
            if _is_same(self.root.folder(VERSIONS, number), archive.folder(VERSIONS, number)):
                self.root.remove(VERSIONS, number)
            else:
                os.rename(self.root.folder(VERSIONS, number), aside / VERSIONS / folder_name(number))
        for name in ("HEAD", "NUMBERS", "store.json"):
            if os.path.lexists(self.places.root / name):
                os.rename(self.places.root / name, aside / name)

    def _identify(self, root_before: Identity | None) -> None:
        """Mark both halves with this opening. The root first: a kill in between leaves it the newer one, not the older.
        A run directory that is new, or a copy, says first of all which root it has."""
        root, run = self.places.root, self.places.run
        run_before = None if self.places.copied_from else Identity.read(run)
        known = run_before or root_before
        run_id = uuid.uuid4().hex if known is None else known.run_id
        other = None if run is None else str(run)
        generation = 1 + max((half.generation for half in (run_before, root_before) if half), default=0)
        identity = Identity(run_id, other, self.places.temporary, None, generation, token=uuid.uuid4().hex)
        durable = replace(identity, other=str(root), home=str(run))
        if run is not None and run_before is None:
            replace(durable, generation=0, token="").write(run, sync=True)
        identity.write(root, sync=self.root.sync)
        if run is not None:
            durable.write(run, sync=True)

    def _recover(self) -> Recovered:
        swept = tuple(name for tree in self.trees for name in tree.leftovers())
        lost, lost_states = self._settle_versions(), self._settle_states()
        # Only now: a folder left in staging tells a version that never was from one that was lost.
        for tree in self.trees:
            tree.sweep()
            for name in _TEMPORARIES:
                (tree.path / name).unlink(missing_ok=True)
        head_moved, here = self._settle_head(), self.root.numbers(VERSIONS)
        unarchived = tuple(n for n in here if self.archive and not self.in_archive(n) and self._is_sound(n))
        if self.archive is not None:
            requests.sweep(self.archive.path)
        return Recovered(
            lost=lost,
            lost_states=lost_states,
            damaged=tuple(sorted(self._damaged)),
            damaged_lines=tuple(self.journal.damaged_lines),
            swept=swept,
            unarchived=unarchived,
            head_moved=head_moved,
            copied_from=self.places.copied_from,
            set_aside=tuple(sorted(self.places.root.glob(f"{ASIDE}*"))),
        )

    def _settle_versions(self) -> tuple[int, ...]:
        present = set(self.numbers())
        for number in sorted(present - self.journal.published.keys()):
            try:
                self.journal.append("publish", **self.manifest(number).fields())
            except StoreCorrupt:
                self._damaged.add(number)
        missing = sorted(self.journal.published.keys() - present)
        for number in missing:
            self.journal.append("forget", number)
        unborn = self.root.leftovers()
        return tuple(n for n in missing if f"staging/{VERSIONS}-{folder_name(n)}" not in unborn)

    def _settle_states(self) -> tuple[int, ...]:
        present, told = set(self.states()), set(self.journal.states)
        for number in sorted(present - told):
            self.journal.append("state", number)
        for number in sorted(told - present):
            self.journal.append("forget_state", number)
        return tuple(sorted(told - present))

    def _settle_head(self) -> tuple[int, int | None] | None:
        """Leave `HEAD` on the version promoted last; where that is lost, on the last one before it that is not."""
        link, linked = self.root.path / "HEAD", None
        with suppress(StoreCorrupt):
            linked = self.head_number() if link.is_symlink() else None
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

    def _bring_to_tmpfs(self, number: int) -> bool:
        here = self.on_tmpfs(number)
        if here and self._is_sound(number):
            return True
        if self.archive is None or not self.archive.has(VERSIONS, number):
            return False
        if here:
            self.root.remove(VERSIONS, number)
        try:
            self.archive.bring_back(self.manifest(number), self.root)
        except StoreCorrupt:
            self._damaged.add(number)
            return False
        self._damaged.discard(number)
        return True

    def _is_sound(self, number: int) -> bool:
        try:
            self.verify_tmpfs(number)
        except StoreCorrupt:
            self._damaged.add(number)
            return False
        return True


def _is_same(version: Path, archived: Path) -> bool:
    """Whether an archived copy is of the same version; what cannot be read is not."""
    with suppress(StoreCorrupt):
        return read_manifest(version) == read_manifest(archived)
    return False
