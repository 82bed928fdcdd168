"""`AdapterStore`: immutable versions on tmpfs, the pointer to the promoted one, and their durable archive."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_grpo.adapters.asking import requests
from lora_grpo.adapters.asking.requests import Request
from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.asking.view import StoreView
from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.catalog import link_head
from lora_grpo.adapters.files.digest import Files, digest_buffers
from lora_grpo.adapters.files.journal import as_metrics
from lora_grpo.adapters.files.layout import MANIFEST_FILE, PEFT_FILES, STATE_FILE, STATES, SUMS_FILE, VERSIONS, Manifest
from lora_grpo.adapters.files.locks import Leases
from lora_grpo.adapters.files.room import Room
from lora_grpo.adapters.upkeep.opening import Recovered, catalog_for_reading
from lora_grpo.adapters.upkeep.retention import Retention
from lora_grpo.adapters.upkeep.session import Session, open_session
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError, StoreCorrupt, StoreError, UnknownVersion


class AdapterStore(StoreView):
    """Versions of one adapter: published, promoted, kept, brought back.

    Bytes go in and out; nothing here knows tensors or engines. One process writes, any number read
    (`readonly=True`). Every method raises `StoreError` for what the file system refused; then nothing is lost and
    nothing half-written is visible. A write that the archive thread could not do is raised by the next call, and
    tried again.

    Numbers never come back. With `archive` they are reserved durably, so that holds after a reboot too (numbering
    then goes on above the reserved block); without one, it holds for the life of the tmpfs only.

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

        Without `root`, the run directory's last one is used, or a new owner-only folder under /dev/shm. Such a root
        is the store's own: closing the store removes it, after everything is in the archive (and without one, for
        good). A root that is named stays.

        `budget_bytes` bounds what versions take on tmpfs. `retention` says what `prune()` keeps, which `NativeSync`
        calls after each push: `keep_latest(8) | keep_best("reward")`, or `Retention()` for all. By default, tmpfs has
        the last 8 of what is in the archive, which keeps all; without one the last 64 and those with the best "reward"
        and "eval/reward" stay, and the first removal is warned of.
        `backlog_limit_bytes` bounds the memory of trainer states that wait for the archive.

        Raises `StoreLocked` naming the process that has it open for writing, `StoreCorrupt` for damage that cannot be
        worked around. Warns when `root` is no tmpfs. `recovered` says what a dead process left, and what was lost.
        """
        if readonly:
            self._session: Session | None = None
            super().__init__(catalog_for_reading(root, archive), Leases(), follow=True)
        else:
            self._session = open_session(root, archive, retention, backlog_limit_bytes)
            super().__init__(self._session.catalog, self._session.leases, follow=False)
            self._finalizer = weakref.finalize(self, self._session.close)
        self._room = Room(self._catalog, budget_bytes)

    @property
    def recovered(self) -> Recovered:
        """What opening for writing found: leftovers of a dead process, and what was lost with it."""
        return Recovered() if self._session is None else self._session.recovered

    # Publishing

    def publish(self, files: Files, *, step: int, parent: Target | None = "head") -> AdapterVersion:
        """Write a new version: the two PEFT files, each as buffers to be laid end to end. `HEAD` does not move.

        "head" as its parent is the version that is promoted by now; None where none is.
        The version appears whole, by one rename. Raises `NoRoom`, before anything is written, when it does not fit
        tmpfs or the budget even after `prune()`; `ConfigError` for other files than a PEFT directory's.
        """
        if set(files) != set(PEFT_FILES):
            raise ConfigError(f"a version holds {', '.join(PEFT_FILES)}; got {', '.join(sorted(files)) or 'no files'}")
        with self._writing("publishing a version") as session:
            sizes = {name: sum(memoryview(part).nbytes for part in files[name]) for name in sorted(files)}
            self._room.make(sizes, session)
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
        if number is not None and not self._catalog.journal.knows(number):
            raise UnknownVersion(f"parent={number}: no such version was ever published here")
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
        """Record what was learned about a version, kept or not, beside it; a name recorded before is overwritten.

        Non-finite numbers become None; a reward, and what retention ranks, is a number. Durable with an archive.
        """
        number = self._number(version)
        with self._writing(f"recording metrics of version {number}") as session:
            values = as_metrics(metrics, session.retention.ranked)
            if not session.journal.knows(number):
                raise UnknownVersion(f"there is no version {number} to record {', '.join(metrics)} of")
            session.journal.append("record", number, metrics=values)

    # Keeping

    def pin(self, version: Target) -> None:
        """Keep a version, its archived copy and its trainer state until `unpin`."""
        number = self._number(version)
        with self._writing(f"pinning version {number}") as session:
            self._catalog.manifest(number)
            session.journal.append("pin", number)

    def unpin(self, version: Target) -> None:
        """Leave a version to retention again."""
        number = self._number(version)
        with self._writing(f"unpinning version {number}") as session:
            if number not in session.journal.pins:
                raise UnknownVersion(f"version {number} is not pinned; pinned are {sorted(session.journal.pins)}")
            session.journal.append("unpin", number)

    def prune(self) -> list[int]:
        """Remove what retention no longer keeps; the numbers whose tmpfs copy went.

        What is leased (by any process), pinned or `HEAD` stays, and so does, with an archive, what the archive is to
        keep and has not got yet. The archive and trainer states follow their own rules, and no durable copy is
        removed in favour of one that still waits for the disk.
        """
        with self._writing("pruning") as session:
            return session.prune()

    def restore(self, version: Target) -> AdapterVersion:
        """The version, its files at its path again: identical bytes, digest checked before they appear.

        A damaged copy on tmpfs is replaced from the archive. Raises `UnknownVersion` when no copy is left,
        `StoreCorrupt` when none is sound.
        """
        number = self._number(version)
        with self._writing(f"restoring version {number}") as session:
            manifest = self._catalog.manifest(number)
            if not self._sound_on_tmpfs(session, number):
                self._room.make(manifest.sizes, session)
                session.required_archive().bring_back(manifest, session.root)
            return self._catalog.version(number)

    def _sound_on_tmpfs(self, session: Session, number: int) -> bool:
        if not self._catalog.on_tmpfs(number):
            return False
        try:
            self._catalog.verify_tmpfs(number)
        except StoreCorrupt:
            if not self._catalog.in_archive(number) or not session.remove_from_tmpfs(number, survives=True):
                raise
            return False
        return True

    # The archive

    def archive_state(self, version: Target, files: Files, meta: Mapping[str, Any]) -> None:
        """Queue a version's trainer state for the archive; `meta` becomes `state.json`.

        The buffers are the store's from now on: nobody may change them. Waits only when more than
        `backlog_limit_bytes` are queued and no queued state is one that retention would drop; raises what the disk
        failed with meanwhile, and then the state is not queued.
        """
        number = self._number(version)
        if clash := {STATE_FILE, SUMS_FILE} & set(files):
            raise ConfigError(f"{clash.pop()} is written by the store; give the trainer's file another name")
        contents = {**files, STATE_FILE: [json.dumps(dict(meta)).encode()]}
        with self._writing(f"archiving the trainer state of version {number}") as session:
            self._catalog.manifest(number)
            if session.required_archive().tree.has(STATES, number) or number in session.writer.pending(STATES):
                raise StoreError(f"version {number} has a trainer state already; states are written once")
            session.archive_state(number, contents)

    def load_state(self, version: Target) -> dict[str, Path] | None:
        if self._session is not None:
            self._session.writer.wait_for(STATES, self._number(version))
        return super().load_state(version)

    @property
    def archive_backlog_bytes(self) -> int:
        """Bytes queued for the archive and not durable yet."""
        return 0 if self._session is None else self._session.writer.backlog_bytes

    def flush(self) -> None:
        """Wait until everything published, recorded and queued is durable; raises what could not be written."""
        with self._writing("flushing the archive") as session:
            session.writer.flush()
            if session.archive is not None:
                session.journal.make_durable()

    # Other processes

    def requests(self) -> list[Request]:
        """What other processes ask for, in the order in which they asked; see `requests.request`."""
        return [] if self.archive is None else requests.pending(self.archive)

    def claim(self, request: Request) -> bool:
        """Begin with a request: it can no longer be taken back. False when it was."""
        with self._writing("beginning with a request") as session:
            return requests.claim(session.required_archive().tree.path, request)

    def answer(self, request: Request, result: Mapping[str, Any]) -> None:
        """Tell the process that asked what became of its request."""
        if self._session is None:
            raise StoreError("answering a request: this store is open with readonly=True")
        # Whatever else went wrong meanwhile, who asked is told.
        requests.answer(self._session.required_archive().tree.path, request, dict(result))

    # Ending

    def close(self) -> None:
        """Finish the archive, prune once more where `prune` was called, and tmpfs of what is archived, and unlock.

        Raises what could not be written; the lock goes all the same. Close the engine first: it may still read
        versions, and a root of the store's own choosing goes now.
        """
        if self._session is None:
            self._leases.close()
            return
        self._finalizer.detach()
        with disk.reported("closing the store"):
            self._session.close()

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self, doing: str) -> Iterator[Session]:
        if self._session is None:
            raise StoreError(f"{doing}: this store is open with readonly=True")
        with self._mutex, disk.reported(doing):
            self._session.require_open()
            yield self._session
