"""Reading a store: which versions there are, where they live, and whether they are what was published."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from lora_grpo.adapters.files.disk import STATES, VERSIONS, Tree, folder_name, number_in, reported, sync_folder
from lora_grpo.adapters.files.journal import Journal, Manifest, read_manifest
from lora_grpo.adapters.files.locks import Leases
from lora_grpo.adapters.files.places import Places
from lora_grpo.adapters.upkeep.archive import Archive, verify_version
from lora_grpo.adapters.upkeep.retention import Place, Retention
from lora_grpo.adapters.version import MANIFEST_FILE, AdapterVersion
from lora_grpo.errors import StoreCorrupt, UnknownVersion


class Catalog:
    """What is on disk. The folders decide which versions exist; the journal saves reading 2,000 manifests."""

    def __init__(self, places: Places, *, root_is_tmpfs: bool = True) -> None:
        """Nothing is changed, not even to mend it. What is written to another root than tmpfs is made durable."""
        self.places = places
        self.root = Tree(places.root, (VERSIONS,), sync=not root_is_tmpfs)
        self.archive = None if places.run is None else Archive(places.run)
        self.journal = Journal(places.journal, sync=places.run is None and not root_is_tmpfs)
        self.leases = Leases()
        self.trees: list[Tree] = [self.root] if self.archive is None else [self.root, self.archive]

    def has(self, number: int) -> bool:
        return any(tree.has(VERSIONS, number) for tree in self.trees)

    def on_tmpfs(self, number: int) -> bool:
        return self.root.has(VERSIONS, number)

    def folder(self, number: int) -> Path:
        holding = (tree for tree in self.trees if tree.has(VERSIONS, number))
        return next(holding, self.root).folder(VERSIONS, number)

    def has_manifest(self, number: int) -> bool:
        with reported(f"looking for version {number}"):
            return (self.root.folder(VERSIONS, number) / MANIFEST_FILE).exists()

    def in_archive(self, number: int, kind: str = VERSIONS) -> bool:
        return self.archive is not None and self.archive.has(kind, number)

    def numbers(self) -> list[int]:
        return sorted({number for tree in self.trees for number in tree.numbers(VERSIONS)})

    def states(self) -> list[int]:
        return [] if self.archive is None else self.archive.numbers(STATES)

    def version(self, number: int) -> AdapterVersion:
        return self.manifest(number).version(self.root.folder(VERSIONS, number))

    def manifest(self, number: int) -> Manifest:
        """What was published as `number`; `UnknownVersion` says why there is none."""
        if (published := self.journal.published.get(number)) is not None and self.has(number):
            return published
        damage: StoreCorrupt | None = None
        for tree in self.trees:
            # Either copy may be removed while it is looked at.
            try:
                return read_manifest(tree.folder(VERSIONS, number))
            except StoreCorrupt as error:
                damage = error if tree.has(VERSIONS, number) else damage
        raise damage or UnknownVersion(self.why_missing(number))

    def why_missing(self, number: int) -> str:
        if self.journal.has_forgotten(number):
            if (why := self.journal.why_forgotten(number)) is not None:
                return f"version {number} was removed by retention: {why}, and HEAD, pinned and leased versions"
            return f"version {number} was lost with the tmpfs before it was archived, or deleted by another program"
        if number in self.journal.published:
            folder = self.root.folder(VERSIONS, number)
            return f"version {number} was published, but {folder} is gone: deleted by another program?"
        return f"there is no version {number}; the last one published is {max(self.journal.published, default=0)}"

    def why_not_on_tmpfs(self, number: int) -> str:
        if self.in_archive(number):
            return f"version {number} is in the archive only; store.restore({number}) brings it back"
        if self.on_tmpfs(number):
            return f"{self.root.folder(VERSIONS, number) / MANIFEST_FILE} is gone: deleted by another program?"
        return self.why_missing(number)

    def head_number(self) -> int | None:
        """The promoted version; where the tmpfs is gone, the last one promoted that has a copy."""
        link = self.root.path / "HEAD"
        with reported(f"reading {link}"):
            try:
                name = Path(os.readlink(link)).name
            except (FileNotFoundError, NotADirectoryError):
                return next((number for number in reversed(self.journal.promoted) if self.has(number)), None)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise StoreCorrupt(f"{link} should be a symbolic link but is not") from None
        if (number := number_in(name)) is None:
            raise StoreCorrupt(f"{link} points to {name!r}, which is not a version")
        return number

    def verify_tmpfs(self, number: int) -> None:
        verify_version(self.root.folder(VERSIONS, number), self.manifest(number))

    def kept(self, retention: Retention, place: Place, numbers: Iterable[int]) -> set[int]:
        """What retention keeps of these in a place; and the pinned ones and `HEAD`, which none removes."""
        candidates = {number: self.journal.metrics_of(number) for number in numbers}
        head = self.head_number()
        return retention.kept(place, candidates) | self.journal.pins | ({head} if head is not None else set())


def link_head(root: Tree, number: int) -> None:
    """Atomically. A short symbolic link takes no page, so a full tmpfs does not refuse it."""
    temporary = root.path / ".HEAD.new"
    temporary.unlink(missing_ok=True)
    os.symlink(f"{VERSIONS}/{folder_name(number)}", temporary)
    os.replace(temporary, root.path / "HEAD")
    if root.sync:
        sync_folder(root.path)
