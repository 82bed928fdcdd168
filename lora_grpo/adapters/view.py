"""What every process may do with a store: look, verify, and keep a version from being removed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_grpo.adapters.catalog import Catalog
from lora_grpo.adapters.layout import STATES, SUMS_FILE, VERSIONS, Identity, Manifest
from lora_grpo.adapters.locks import Leases
from lora_grpo.adapters.naming import run_name
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import StoreError, UnknownVersion


class StoreView:
    """The part of `AdapterStore` that does not write."""

    def __init__(self, catalog: Catalog, leases: Leases, *, follow: bool) -> None:
        """`follow`: another process may be writing, so look at its journal again each time."""
        self._catalog = catalog
        self._leases = leases
        self._follow = follow
        self._mutex = threading.RLock()

    @property
    def root(self) -> Path:
        """The folder on tmpfs."""
        return self._catalog.root.path

    @property
    def archive(self) -> Path | None:
        """The durable run directory."""
        return None if self._catalog.archive is None else self._catalog.archive.tree.path

    @cached_property
    def run(self) -> str:
        """The run's name beyond this store: letters, digits, '.', '_' and '-', and no other run's."""
        folder = self.archive or self.root
        identity = Identity.read(folder)
        if identity is None:
            raise StoreError(f"{folder / 'store.json'} is gone: deleted by another program?")
        return run_name(folder, identity.run_id)

    @property
    def head(self) -> AdapterVersion | None:
        """The promoted version, None before the first promotion."""
        catalog = self._looking()
        number = catalog.head_number()
        return None if number is None else catalog.version(number)

    def get(self, number: int) -> AdapterVersion:
        """A version with a copy on tmpfs or in the archive; `UnknownVersion` says what became of another.

        `restore` makes sure that its `path` is there.
        """
        return self._looking().version(number)

    def parent_of(self, number: int) -> int | None:
        """The version that a version was made from, be they kept or not.

        None for a first one, for a number that was never given out, and where the run's history is damaged.
        """
        return self._looking().parent_of(number)

    def where(self, number: int) -> frozenset[str]:
        """Which of "tmpfs", "archive" and "state" (the trainer state) there are of a version."""
        catalog = self._looking()
        has = {
            "tmpfs": catalog.on_tmpfs(number),
            "archive": catalog.in_archive(number),
            "state": catalog.has_state(number),
        }
        return frozenset(place for place, there in has.items() if there)

    def manifest(self, number: int) -> Manifest:
        """What was published as a version: digest and sizes; `UnknownVersion` where there is no copy."""
        return self._looking().manifest(number)

    def size_bytes(self, number: int) -> int:
        """Bytes of a version's PEFT files."""
        return self.manifest(number).size_bytes

    def verify(self, number: int) -> None:
        """Read every copy of a version and its trainer state; `StoreCorrupt` names the file that differs, and how."""
        catalog = self._looking()
        with ExitStack() as reading:
            if catalog.has_manifest(number):
                reading.enter_context(self.lease(number))
            catalog.verify(number)

    def readable(self, version: int | AdapterVersion) -> Path:
        """A folder that holds a version's two PEFT files, on tmpfs or in the archive; every copy is verified first."""
        number = number_of(version)
        self.verify(number)
        catalog = self._looking()
        places = [catalog.root] if catalog.on_tmpfs(number) or catalog.archive is None else [catalog.archive.tree]
        return places[0].folder(VERSIONS, number)

    @contextmanager
    def reading(self, number: int) -> Iterator[Path]:
        """A folder that holds a version's two PEFT files: on tmpfs, leased while the block runs, or in the archive.

        Nothing is verified. Retention may remove the archived folder meanwhile; files that are open then stay whole.
        """
        with ExitStack() as held:
            try:
                folder = held.enter_context(self.lease(number)).path
            except UnknownVersion:
                catalog = self._looking()
                if catalog.archive is None or not catalog.in_archive(number):
                    raise
                folder = catalog.archive.tree.folder(VERSIONS, number)
            yield folder

    @property
    def numbers(self) -> list[int]:
        """Every version with a copy somewhere, those that cannot be read included."""
        return self._looking().numbers()

    @property
    def states(self) -> list[int]:
        """Every version whose trainer state is kept."""
        return self._looking().states()

    @property
    def missing(self) -> list[int]:
        """Versions without a copy that no retention removed: deleted by another program, or lost with the tmpfs."""
        catalog = self._looking()
        return sorted(catalog.journal.published.keys() - set(catalog.numbers()))

    @property
    def damaged_lines(self) -> tuple[int, ...]:
        """Lines of the journal, counted from 1, that cannot be read: what they held of the run's history is lost."""
        return tuple(self._looking().journal.damaged_lines)

    def metrics(self, number: int) -> dict[str, Any]:
        """Everything recorded of a version."""
        return self._looking().metrics(number)

    @property
    def pins(self) -> frozenset[int]:
        """Versions that retention leaves alone."""
        return frozenset(self._looking().journal.pins)

    @contextmanager
    def lease(self, version: int | AdapterVersion) -> Iterator[AdapterVersion]:
        """Keep a version on tmpfs while the block runs."""
        held = self.acquire(version)
        try:
            yield held
        finally:
            self.release(version)

    def acquire(self, version: int | AdapterVersion) -> AdapterVersion:
        """Keep a version on tmpfs until `release`, counted; readers may too. A process that dies holds nothing.

        Raises `UnknownVersion` for a version that is not on tmpfs.
        """
        number = number_of(version)
        with self._mutex:
            catalog = self._looking()
            if not catalog.has_manifest(number):
                raise UnknownVersion(catalog.why_not_on_tmpfs(number))
            self._leases.acquire(number, catalog.root.folder(VERSIONS, number))
            return catalog.version(number)

    def release(self, version: int | AdapterVersion) -> None:
        """End one `acquire`."""
        with self._mutex:
            self._leases.release(number_of(version))

    @property
    def leased(self) -> frozenset[int]:
        """Versions that this store leases (others may lease more)."""
        return self._leases.numbers

    def load_state(self, number: int) -> dict[str, Path] | None:
        """The files of a version's trainer state by name (`state.json` holds its meta), or None when not kept.

        The writer waits for one that is on its way. Raises `StoreCorrupt` when a file is not what was written.
        """
        archive = self._catalog.archive
        if archive is None or not archive.tree.has(STATES, number):
            return None
        archive.verify(STATES, number)
        folder = archive.tree.folder(STATES, number)
        return {path.name: path for path in sorted(folder.iterdir()) if path.name != SUMS_FILE}

    def _looking(self) -> Catalog:
        """The catalog, with what a writer elsewhere has added since the last look."""
        if self._follow:
            with self._mutex:
                self._catalog.journal.refresh()
        return self._catalog

    def list(self) -> list[AdapterVersion]:
        """Every version with a copy somewhere, in order of number."""
        return self._looking().versions()


def number_of(version: int | AdapterVersion) -> int:
    return version.number if isinstance(version, AdapterVersion) else int(version)
