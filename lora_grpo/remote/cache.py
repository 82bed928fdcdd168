"""A replica's own copies of versions, on its tmpfs: pulled once, never removed while its engine may read them again."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

from lora_grpo.adapters.files.disk import Tree, make_private, reported
from lora_grpo.adapters.files.layout import VERSIONS, Manifest
from lora_grpo.adapters.files.locks import OwnFolder
from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.version import served_name
from lora_grpo.errors import NoRoom
from lora_grpo.remote.client import StoreClient

MIB = 1 << 20
_FOLDER = "replica-"


class ReplicaCache:
    """Versions below a folder of this process's own; the folder goes when the process ends.

    A server may evict an adapter from memory and read its path again at any later request that names it, and it never
    says when it will not: so nothing is removed before the process ends. What would exceed the budget is refused.
    One thread at a time pulls.
    """

    def __init__(self, parent: Path, budget_bytes: int | None = None) -> None:
        """Take a new folder in `parent`, and remove what dead processes left there.

        `budget_bytes` bounds what this process keeps; None is half of the file system.
        """
        with reported(f"opening the replica's cache in {parent}"):
            make_private(parent)
            self.swept = OwnFolder.sweep(parent, _FOLDER)
            own = OwnFolder(parent, _FOLDER)
            half_bytes = shutil.disk_usage(parent).total // 2
        self.folder = own.path
        self.budget_bytes = half_bytes if budget_bytes is None else budget_bytes
        self.used_bytes = 0
        self.close = weakref.finalize(self, own.close)
        """Removes the folder, now or when the process ends. Close the engine first."""

    def path(self, run: str, number: int) -> Path | None:
        """Where a version lies, None where it was not pulled. A folder in its place is whole and was checked."""
        tree = self._tree(run)
        return tree.folder(VERSIONS, number) if tree.has(VERSIONS, number) else None

    def pull(self, client: StoreClient, run: str, number: int) -> Path:
        """The path of a version that is not here yet; it appears whole, after its digest and layout were checked.

        Raises `NoRoom` before anything is transferred, and whatever `StoreClient` and `open_adapter` raise; then
        nothing of it is left.
        """
        manifest = client.manifest(run, number)
        self._require_room(served_name(run, number), manifest)
        tree = self._tree(run)
        with reported(f"pulling {served_name(run, number)}"):
            tree.create()
            with tree.staged(VERSIONS, number) as folder:
                client.pull(run, manifest, folder)
                open_adapter(manifest.version(folder))
        self.used_bytes += manifest.size_bytes
        return tree.folder(VERSIONS, number)

    def _tree(self, run: str) -> Tree:
        return Tree(self.folder / run, (VERSIONS,), sync=False)

    def _require_room(self, name: str, manifest: Manifest) -> None:
        left = min(self.budget_bytes - self.used_bytes, shutil.disk_usage(self.folder).free)
        if manifest.size_bytes > left:
            raise NoRoom(
                f"{name} takes {manifest.size_bytes / MIB:.1f} MiB, but this replica has room for {left / MIB:.1f}: it "
                f"keeps {self.used_bytes / MIB:.1f} MiB of versions that it may have to read again. Give it more with "
                "LORA_GRPO_STORE_CACHE_MIB (and a tmpfs that holds it), or restart it: that empties its cache"
            )
