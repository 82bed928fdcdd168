"""Where the two halves of a store lie, and whether they belong together.

A run directory may be moved or copied, and opened on another machine. So each opening writes into both halves where
the run directory lies and which opening it was. A run directory whose recorded place still holds the same run is a
copy: it gets a root of its own. A root that was not there when the run was last opened is out of date."""

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.layout import Identity
from lora_grpo.adapters.files.locks import WriterLock
from lora_grpo.errors import StoreError

ASIDE = "aside-"
_OWN_NAMES = {
    "store.json", ".store.json.new", "LOCK", "NUMBERS", ".NUMBERS.new", "HEAD", ".HEAD.new", "journal.jsonl",
    "versions", "staging", "trash",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Places:
    """The two halves of a store. `temporary`: the store chose the root, nobody else knows it by name.
    `copied_from`: the run directory that this one was copied from, until it was opened for writing."""

    root: Path
    run: Path | None
    temporary: bool
    copied_from: Path | None = None

    @property
    def journal(self) -> Path:
        return (self.run or self.root) / "journal.jsonl"

    @property
    def aside(self) -> list[Path]:
        """What was set aside of roots that were out of date."""
        return sorted(self.root.glob(f"{ASIDE}*"))


def _no_store(directory: Path) -> str:
    from lora_grpo.config_file import told_as_sweep  # takes as long to import as all of the store

    return told_as_sweep(directory) or f"there is no store in {directory}: it is not a run's directory"


def for_reading(root: str | Path | None, archive: str | Path | None) -> Places:
    """Find an existing store, by either half. Of a run directory whose root is not its own, the archive is all."""
    run = None if archive is None else Path(archive).resolve()
    identity = None if run is None else Identity.read(run)
    if root is None:
        if run is None or identity is None or identity.other is None:
            raise StoreError(_no_store(run) if run else "give the store's root= or its run directory (archive=)")
        own = Path(identity.other)
        there = Identity.read(own)
        strange = there is not None and not _is_current(there, identity)
        if strange or _original(run, identity, there) is not None:
            own = run / "not-opened"
        return Places(own, run, False)
    found = Path(root).resolve()
    identity = Identity.read(found)
    if identity is None and run is None:
        raise StoreError(_no_store(found))
    if run is None and identity is not None and identity.other is not None:
        run = Path(identity.other)
    return Places(found, run, False)


def expected_root(root: str | Path | None, run: Path) -> Path:
    """Where a run's versions will be: the root asked for, the one it has, else the folder that it will be made in."""
    identity = Identity.read(run)
    own = None if identity is None else identity.other
    return Path(root or own or disk.tmpfs_home()).resolve()


def for_writing(root: str | Path | None, archive: str | Path | None, lock: WriterLock) -> Places:
    """Find or create both halves, each locked before anything in it is believed or changed."""
    run = None if archive is None else Path(archive).resolve()
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        lock.take(run)
    identity = None if run is None else Identity.read(run)
    places = _chosen(None if root is None else Path(root).resolve(), run, identity)
    disk.make_private(places.root)
    names = {name for name in os.listdir(places.root) if not name.startswith(ASIDE)}
    if Identity.read(places.root) is None and (foreign := names - _OWN_NAMES):
        raise StoreError(f"{places.root} holds {sorted(foreign)[:3]} but no store; give the store its own folder")
    lock.take(places.root)
    _refuse_other_run(places, None if places.copied_from else identity)
    return places


def _chosen(root: Path | None, run: Path | None, identity: Identity | None) -> Places:
    before = None if identity is None or identity.other is None else Path(identity.other)
    there = None if before is None else Identity.read(before)
    if run is None or identity is None:
        return Places(root or _new_root(run), run, root is None)
    original = _original(run, identity, there)
    if root is not None:
        if original is not None and (asked := Identity.read(root)) is not None and asked.run_id == identity.run_id:
            fix = "give the copy another root (or none: then it gets its own)"
            raise StoreError(f"{run} is a copy of the run in {original}, which uses the root {root}; {fix}")
        if original is None and before not in (None, root) and _is_current(there, identity):
            raise StoreError(f"the versions of {run} are in {before}: open it with that root, or without root=")
        return Places(root, run, False, original)
    # Somebody else may have taken the place of a root meanwhile.
    if before is None or original is not None or (before.exists() and before.stat().st_uid != os.geteuid()):
        return Places(_new_root(run), run, True, original)
    return Places(before, run, identity.own_root)


def _original(run: Path, identity: Identity, root: Identity | None) -> Path | None:
    """The run directory that `run` was copied from: where it, or its root, says that it lay, and the same run lies."""
    paired = root is not None and root.run_id == identity.run_id
    for recorded in (identity.home, root.other if root is not None and paired else None):
        if recorded is None or Path(recorded) == run:
            continue
        # What cannot be read there is no run of this user's any more.
        with suppress(StoreError, OSError):
            there = Identity.read(Path(recorded))
            if there is not None and there.run_id == identity.run_id and not os.path.samefile(recorded, run):
                return Path(recorded)
    return None


def _is_current(root: Identity | None, run: Identity) -> bool:
    return root is not None and root.run_id == run.run_id and not root.is_older_than(run)


def _new_root(run: Path | None) -> Path:
    label = "" if run is None else f"{run.name}-"
    return Path(tempfile.mkdtemp(prefix=f"lora-grpo-{label}", dir=disk.tmpfs_home()))


def _refuse_other_run(places: Places, identity: Identity | None) -> None:
    """`identity`: what the run directory says that it is, None for a new one and for a copy."""
    root, run, there = places.root, places.run, Identity.read(places.root)
    if there is None:
        return
    if run is None and there.other is not None:
        raise StoreError(f"{root} belongs to the run in {there.other}: open it with archive={there.other!r}")
    adopted = identity is None and there.other is None and places.copied_from is None
    if run is not None and not adopted and (identity is None or identity.run_id != there.run_id):
        other = there.other or "one without an archive"
        fix = "choose another root, or remove that folder if its versions are no longer needed"
        raise StoreError(f"{root} holds versions of another run ({other}), not of {run}; {fix}")
