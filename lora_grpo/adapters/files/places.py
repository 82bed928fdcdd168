"""Where the two halves of a store lie, whether they belong together, and whether versions fit.

A `store.json` in both says whose half it is (`Identity`). A run directory may be moved or copied, and opened on another
machine. So each opening writes into both where the run directory lies and which opening it was: a generation that
counts openings and a random token. A run directory whose recorded place still holds the same run is a copy: it gets a
root of its own. A root of a lower generation, which was not there when the run was last opened, is out of date.

The journal is the truth for metrics, pins and past promotions, and lies in the root where there is no run directory;
for which versions exist the folders are. Where the tmpfs is gone, the journal's last promotion of a version that was
archived takes the place of `HEAD`."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.locks import WriterLock
from lora_grpo.errors import NoRoom, StoreError

FORMAT = 1
MIB = 1 << 20
PAGE_BYTES = 4096
ASIDE = "aside-"
_OWN_NAMES = {"store.json", "LOCK", "NUMBERS", "HEAD", "journal.jsonl", "versions", "staging", "trash"}


@dataclass(frozen=True, slots=True)
class Identity:
    """What `store.json` says. `other`: the other half. `own_root`: the store chose the root itself, and clears it on
    closing. `home`: where the run directory lay then (None: this is the root's). `generation` and `token`: which
    opening wrote it (0 and "": none)."""

    run_id: str
    other: str | None
    own_root: bool
    home: str | None
    generation: int
    token: str

    def write(self, folder: Path, *, sync: bool) -> None:
        content = json.dumps({"format": FORMAT, **asdict(self)}) + "\n"
        disk.replace_file(folder / "store.json", content.encode(), sync=sync)

    def is_older_than(self, other: "Identity") -> bool:
        """Whether this half was not there when the other was last opened; of two equally old ones that differ, yes."""
        return self.generation <= other.generation and self.token != other.token

    @classmethod
    def read(cls, folder: Path | None) -> "Identity | None":
        if folder is None:
            return None
        path = folder / "store.json"

        def build(values: Mapping[str, Any]) -> Identity:
            if values["format"] != FORMAT:
                raise StoreError(f"{path} has format {values['format']}; this release reads format {FORMAT}")
            found = cls(**{name: values[name] for name in cls.__slots__})
            texts = (found.run_id, found.other or "", found.home or "", found.token)
            plain = all(isinstance(text, str) and "\0" not in text for text in texts)
            if not plain or (type(found.own_root), type(found.generation)) != (bool, int):
                raise ValueError("its fields are not the fields of a store")
            return found

        return disk.read_record(path, build)


@dataclass(frozen=True, slots=True)
class Places:
    """The two halves of a store. `temporary`: the store chose the root, nobody else knows it by name.
    `copied_from`: the run directory that this one was copied from, until it was opened for writing."""

    root: Path
    run: Path | None
    temporary: bool = False
    copied_from: Path | None = None

    @property
    def journal(self) -> Path:
        return (self.run or self.root) / "journal.jsonl"


def _resolved(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).resolve()


def _no_store(directory: Path) -> str:
    from lora_grpo.config_file import told_as_sweep  # takes as long to import as all of the store

    return told_as_sweep(directory) or f"there is no store in {directory}: it is not a run's directory"


def for_reading(root: str | Path | None, archive: str | Path | None) -> Places:
    """Find an existing store, by either half. Of a run directory whose root is not its own, the archive is all."""
    found, run = _resolved(root), _resolved(archive)
    identity, there = Identity.read(run), Identity.read(found)
    if found is not None:
        if run is None and there is None:
            raise StoreError(_no_store(found))
        return Places(found, run or (Path(there.other) if there is not None and there.other is not None else None))
    if run is None or identity is None or identity.other is None:
        raise StoreError(_no_store(run) if run else "give the store's root= or its run directory (archive=)")
    own, there = Path(identity.other), Identity.read(Path(identity.other))
    is_foreign = there is not None and not _is_current(there, identity)
    return Places(run / "not-opened" if is_foreign or _original(run, identity, there) else own, run)


def expected_root(root: str | Path | None, run: Path) -> Path:
    identity = Identity.read(run)
    return Path(root or (identity and identity.other) or disk.tmpfs_home()).resolve()


def for_writing(root: str | Path | None, archive: str | Path | None, lock: WriterLock) -> Places:
    """Find or create both halves, each locked before anything in it is believed or changed."""
    run = _resolved(archive)
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        lock.take(run)
    identity = Identity.read(run)
    places = _chosen(_resolved(root), run, identity)
    disk.make_private(places.root)
    names = [name for name in sorted(os.listdir(places.root)) if not name.startswith(ASIDE)]
    # A file of ours is `.NAME.new` while it is written.
    foreign = [name for name in names if name.removeprefix(".").removesuffix(".new") not in _OWN_NAMES]
    if foreign and Identity.read(places.root) is None:
        raise StoreError(f"{places.root} holds {foreign[:3]} but no store; give the store its own folder")
    lock.take(places.root)
    _refuse_other_run(places, None if places.copied_from else identity)
    return places


def _chosen(root: Path | None, run: Path | None, identity: Identity | None) -> Places:
    before = None if identity is None or identity.other is None else Path(identity.other)
    there = Identity.read(before)
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
    for recorded in (identity.home, root.other if root is not None and root.run_id == identity.run_id else None):
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
    return Path(tempfile.mkdtemp(prefix=f"lora-grpo-{run.name}-" if run else "lora-grpo-", dir=disk.tmpfs_home()))


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


def require_room(folder: Path, sizes: Mapping[str, int], what: str) -> None:
    if wanting := lacking(folder, sizes):
        raise NoRoom(f"{what} {wanting}: free some of it, or use {larger(folder)}")


def require_kept(root: Path, versions: int, size_bytes: int) -> str:
    """How `versions`, and one being written, fit a `root` that need not be there yet, for people; else `NoRoom`."""
    folder = next(one for one in (root, *root.parents) if one.is_dir())
    more = max(1, versions + 1 - len(list(root.glob("versions/*"))))
    what = f"keeping {versions} versions (keep.on_tmpfs, and one more that is being written)"
    try:
        require_room(folder, dict.fromkeys(map(str, range(more)), size_bytes), what)
    except NoRoom as error:
        raise NoRoom(f"{error}, or lower keep.on_tmpfs") from None
    free = shutil.disk_usage(folder).free / MIB
    return f"{versions} + 1 versions of {size_bytes / MIB:,.2f} MiB; {free:,.0f} MiB are free in {folder}"


def larger(folder: Path) -> str:
    return f"a larger tmpfs{size}" if (size := disk.shm_size(folder)) else "a larger file system"


def lacking(folder: Path, sizes: Mapping[str, int]) -> str | None:
    # Beyond the files' own, for the manifest and the folder's bookkeeping: 3.
    pages = 3 + sum(-(-size // PAGE_BYTES) for size in sizes.values())
    need, there = pages * PAGE_BYTES, shutil.disk_usage(folder)
    if need <= there.free:
        return None
    room, size = there.free / MIB, there.total / MIB
    return f"needs {need / MIB:.2f} MiB and {folder} has room for {room:.2f} MiB of {size:.0f} MiB"
