"""`AdapterStore`: immutable versions on tmpfs, the pointer to the promoted one, and their durable archive."""

import json
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_grpo.adapters.asking.view import StoreView
from lora_grpo.adapters.files.catalog import Catalog, link_head
from lora_grpo.adapters.files.disk import STATES, VERSIONS, Files, digest_buffers, reported
from lora_grpo.adapters.files.journal import Manifest, as_metric
from lora_grpo.adapters.files.places import for_reading
from lora_grpo.adapters.upkeep.archive import SUMS_FILE
from lora_grpo.adapters.upkeep.opening import Recovered
from lora_grpo.adapters.upkeep.retention import Retention
from lora_grpo.adapters.upkeep.session import Session, open_session
from lora_grpo.adapters.version import MANIFEST_FILE, PEFT_FILES, STATE_FILE, AdapterVersion, Target
from lora_grpo.errors import ConfigError, StoreCorrupt, StoreError, UnknownVersion


class AdapterStore(StoreView):
    """Keeps the versions of one adapter: publishes, promotes, prunes and restores them.

    It stores bytes and knows nothing of tensors or engines. One process writes, any number can read
    (`readonly=True`). If the file system refuses something, the method raises `StoreError`; nothing is lost, and
    nothing half-written is visible. If the archive thread could not write, the next call raises the error and tries
    again.

    A number is never used twice. With `archive` numbers are reserved on disk, so this is true even after a reboot
    (numbering then goes on above the reserved block). Without one, it is true only while the tmpfs exists.

    >>> files = {"adapter_model.safetensors": [b"bytes"], "adapter_config.json": [b"{}"]}  # as `NativeSync` makes them
    >>> with AdapterStore() as store:
    ...     version = store.publish(files, step=0)
    ...     store.promote(version)
    ...     store.record(version, reward=0.7)
    ...     store.head, store.metrics("best")["reward"]
    (AdapterVersion(number=1, ...), 0.7)
    """

    def __init__(
        self,
        root: str | Path | None = None,
        archive: str | Path | None = None,
        *,
        budget_bytes: int | None = None,
        retention: Retention | None = None,
        readonly: bool = False,
        backlog_limit_bytes: int = 1 << 30,
    ) -> None:
        """Open the store in `root` (tmpfs) and `archive` (the durable run directory), or create it.

        Without `root`, it uses the last root of the run directory, or a new owner-only folder under /dev/shm. Such a
        root is removed when the store is closed, after everything is in the archive (without an archive, for good).
        A root that you name stays.

        `budget_bytes` limits the size of all versions on tmpfs. `retention` says what `prune()` keeps; `NativeSync`
        calls it after each push. Examples: `keep_latest(8) | keep_best("reward")`, or `Retention()` for all. By
        default the archive keeps all versions and tmpfs the last 8. Without an archive, tmpfs keeps the last 64 and
        those with the best "reward" and "eval/reward", and warns before the first removal.
        `backlog_limit_bytes` limits the memory of trainer states that wait for the archive.

        Raises `StoreLocked` with the name of the process that has it open for writing, and `StoreCorrupt` if it is
        damaged. Warns if `root` is not on tmpfs. `recovered` says what a dead process left and what was lost.
        """
        if readonly:
            self._session: Session | None = None
            with reported("opening a store for reading"):
                super().__init__(Catalog(for_reading(root, archive)), follow=True)
        else:
            self._session = open_session(root, archive, retention, backlog_limit_bytes)
            super().__init__(self._session, follow=False)
            self._finalizer = weakref.finalize(self, self._session.close)
        self._budget_bytes = budget_bytes

    @property
    def recovered(self) -> Recovered:
        """What opening for writing found: leftovers of a dead process, and what was lost with it."""
        return Recovered() if self._session is None else self._session.recovered

    # Publishing

    def publish(self, files: Files, *, step: int, parent: Target | None = "head") -> AdapterVersion:
        """Write a new version: the two PEFT files, each as buffers to be laid end to end. `HEAD` does not move.

        The parent "head" means the promoted version, or None if there is none.
        The version appears complete, by one rename. Raises `NoRoom`, before anything is written, when it does not fit
        tmpfs or the budget even after `prune()`; `ConfigError` for other files than a PEFT directory's.
        """
        if set(files) != set(PEFT_FILES):
            raise ConfigError(f"a version holds {', '.join(PEFT_FILES)}; got {', '.join(sorted(files)) or 'no files'}")
        with self._writing("publishing a version") as session:
            sizes = {name: sum(memoryview(part).nbytes for part in files[name]) for name in sorted(files)}
            session.make_room(sizes, self._budget_bytes)
            ancestor = self._catalog.head_number() if parent == "head" else self._parent(parent)
            number = session.numbering.next()
            manifest = Manifest(number, ancestor, digest_buffers(files), int(step), time.time(), sizes)
            self._write(session, manifest, files)
            session.archive_version(manifest)
        return self._catalog.version(number)

    def _write(self, session: Session, manifest: Manifest, files: Files) -> None:
        tree, number = session.root, manifest.number
        try:
            with tree.staged(VERSIONS, number) as folder:
                tree.write(folder, {**files, MANIFEST_FILE: [manifest.to_bytes()]})
                session.journal.append("publish", **manifest.fields())
        except BaseException:
            if number in session.journal.published and not tree.has(VERSIONS, number):
                session.journal.append("forget", number)
            raise

    def _parent(self, parent: Target | None) -> int | None:
        number = None if parent is None else self._number(parent)
        if number is not None and number not in self._catalog.journal.parents:
            raise UnknownVersion(f"parent={number}: this store never published such a version")
        return number

    def promote(self, version: Target) -> None:
        """Move `HEAD` to a version on tmpfs, atomically."""
        number = self._number(version)
        with self._writing(f"promoting version {number}") as session:
            if not self._catalog.on_tmpfs(number):
                raise UnknownVersion(self._catalog.why_not_on_tmpfs(number))
            before = self._catalog.head_number()
            session.journal.append("promote", number)
            try:
                link_head(session.root, number)
            except BaseException:
                # Where the tmpfs goes, the journal's last promotion is HEAD: it must not name one that failed.
                if before is not None and before != number:
                    session.journal.append("promote", before)
                    if self._catalog.head_number() == number:
                        link_head(session.root, before)
                raise

    def record(self, version: Target, **metrics: float | int | str | bool | None) -> None:
        """Record metrics of a version, even if it is no longer kept; a metric of the same name is overwritten.

        Non-finite numbers become None. A reward, or a metric that retention ranks by, must be a number.
        """
        number = self._number(version)
        with self._writing(f"recording metrics of version {number}") as session:
            ranked = session.retention.ranked
            values = {name: as_metric(name, value, ranked) for name, value in metrics.items()}
            if number not in session.journal.parents:
                raise UnknownVersion(f"cannot record {', '.join(metrics)}: there is no version {number}")
            session.journal.append("record", number, metrics=values)

    # Keeping

    def pin(self, version: Target) -> None:
        """Keep a version, its archived copy and its trainer state until `unpin`."""
        number = self._number(version)
        with self._writing(f"pinning version {number}") as session:
            self._catalog.manifest(number)
            session.journal.append("pin", number)

    def unpin(self, version: Target) -> None:
        """Undo `pin`: retention decides again when the version is removed."""
        number = self._number(version)
        with self._writing(f"unpinning version {number}") as session:
            if number not in session.journal.pins:
                raise UnknownVersion(f"version {number} is not pinned; pinned are {sorted(session.journal.pins)}")
            session.journal.append("unpin", number)

    def prune(self) -> list[int]:
        """Remove what retention no longer keeps; returns the numbers whose tmpfs copy was removed.

        Versions that are leased (by any process), pinned or `HEAD` stay. With an archive, versions that still wait to
        be archived stay too. The archive and trainer states have their own rules. No copy on disk is removed for one
        that still waits for the disk.
        """
        with self._writing("pruning") as session:
            return session.prune()

    def restore(self, version: Target) -> AdapterVersion:
        """Put the version's files back at its path: identical bytes, whose digest is checked first.

        A damaged copy on tmpfs is replaced from the archive. Raises `UnknownVersion` if no copy is left, and
        `StoreCorrupt` if all copies are damaged.
        """
        number = self._number(version)
        with self._writing(f"restoring version {number}") as session:
            manifest, is_here = self._catalog.manifest(number), self._catalog.on_tmpfs(number)
            try:
                if is_here:
                    self._catalog.verify_tmpfs(number)
            except StoreCorrupt:
                if not self._catalog.in_archive(number) or not session.remove_from_tmpfs(number, survives=True):
                    raise
                is_here = False
            if not is_here:
                session.make_room(manifest.sizes, self._budget_bytes)
                session.required_archive().bring_back(manifest, session.root)
            return self._catalog.version(number)

    # The archive

    def archive_state(self, version: Target, files: Files, meta: Mapping[str, Any]) -> None:
        """Queue a version's trainer state for the archive; `meta` becomes `state.json`.

        Do not change the buffers after this call. It waits only if more than `backlog_limit_bytes` are queued and
        retention would keep all queued states. If the disk has failed in the meantime, it raises that error and does
        not queue the state.
        """
        number = self._number(version)
        if clash := {STATE_FILE, SUMS_FILE} & set(files):
            raise ConfigError(f"{clash.pop()} is a file that the store writes; give the trainer's file another name")
        contents = {**files, STATE_FILE: [json.dumps(dict(meta)).encode()]}
        with self._writing(f"archiving the trainer state of version {number}") as session:
            self._catalog.manifest(number)
            if session.required_archive().has(STATES, number) or number in session.writer.pending(STATES):
                raise StoreError(f"version {number} already has a trainer state; a state is written only once")
            session.archive_state(number, contents)

    def load_state(self, version: Target) -> dict[str, Path] | None:
        if self._session is not None:
            self._session.writer.wait_for(STATES, self._number(version))
        return super().load_state(version)

    @property
    def archive_backlog_bytes(self) -> int:
        """Bytes that are queued for the archive and not on disk yet."""
        return 0 if self._session is None else self._session.writer.backlog_bytes

    def flush(self) -> None:
        """Wait until all versions, metrics and states are on disk; raises the error if something was not written."""
        with self._writing("flushing the archive") as session:
            session.writer.flush()
            session.journal.make_durable()

    # Ending

    def close(self) -> None:
        """Finish the archive, prune once more where `prune` was called, and tmpfs of what is archived, and unlock.

        Raises the error if something was not written; the lock is released anyway. Close the engine first, because
        it may still read versions, and a root that the store chose itself is removed now.
        """
        if self._session is None:
            self._catalog.leases.close()
            return
        self._finalizer.detach()
        with reported("closing the store"):
            self._session.close()

    def __enter__(self) -> "AdapterStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self, doing: str) -> Iterator[Session]:
        if self._session is None:
            raise StoreError(f"{doing}: this store is open with readonly=True")
        with self._mutex, reported(doing):
            self._session.require_open()
            yield self._session
