"""What every process may do with a store: look, verify, and keep a version from being removed."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files.catalog import Catalog
from lora_grpo.adapters.files.disk import STATES, VERSIONS
from lora_grpo.adapters.files.journal import Manifest
from lora_grpo.adapters.files.locks import is_leased
from lora_grpo.adapters.files.places import Identity
from lora_grpo.adapters.upkeep.archive import SUMS_FILE, verify_version
from lora_grpo.adapters.upkeep.retention import Retention, is_score
from lora_grpo.adapters.version import AdapterVersion, Target, parse_target, run_name
from lora_grpo.errors import StoreCorrupt, StoreError, UnknownVersion


class StoreView:
    """The part of `AdapterStore` that does not write."""

    def __init__(self, catalog: Catalog, *, follow: bool) -> None:
        """`follow`: another process may be writing, so look at its journal again each time."""
        self._catalog, self._follow = catalog, follow
        self._mutex = threading.RLock()

    @property
    def root(self) -> Path:
        """The folder on tmpfs."""
        return self._catalog.root.path

    @property
    def archive(self) -> Path | None:
        """The durable run directory."""
        return None if self._catalog.archive is None else self._catalog.archive.path

    @cached_property
    def run(self) -> str:
        """The run's name beyond this store: letters, digits, '.', '_' and '-', and no other run's."""
        folder = self.archive or self.root
        if (identity := Identity.read(folder)) is None:
            raise StoreError(f"{folder / 'store.json'} is gone; did another program delete it?")
        return run_name(folder, identity.run_id)

    @property
    def head(self) -> AdapterVersion | None:
        """The promoted version, None before the first promotion."""
        catalog = self._looking()
        number = catalog.head_number()
        return None if number is None else catalog.version(number)

    def get(self, version: Target) -> AdapterVersion:
        """A version with a copy on tmpfs or in the archive; `restore` makes sure that its `path` is there.

        Every method takes a version as `Target` says: 12, "v12", "head", "parent", "best", "best:METRIC", or itself."""
        return self._looking().version(self._number(version))

    def parent_of(self, version: Target) -> int | None:
        """The version that a version was made from, kept or not; None for a first one, and where nothing tells."""
        catalog, number = self._looking(), self._number(version)
        if number in catalog.journal.parents:
            return catalog.journal.parents[number]
        with suppress(UnknownVersion, StoreCorrupt):
            return catalog.manifest(number).parent
        return None

    def where(self, version: Target) -> frozenset[str]:
        """Which of "tmpfs", "archive" and "state" (the trainer state) there are of a version."""
        catalog, number = self._looking(), self._number(version)
        archived, state = catalog.in_archive(number), catalog.in_archive(number, STATES)
        holds = {"tmpfs": catalog.on_tmpfs(number), "archive": archived, "state": state}
        return frozenset(place for place, there in holds.items() if there)

    def manifest(self, version: Target) -> Manifest:
        """What was published as a version: digest and sizes; `UnknownVersion` where there is no copy."""
        return self._looking().manifest(self._number(version))

    def verify(self, version: Target) -> None:
        """Read every copy of a version and its trainer state; `StoreCorrupt` names the file that differs, and how."""
        catalog, number = self._looking(), self._number(version)
        with ExitStack() as reading:
            if catalog.has_manifest(number):
                reading.enter_context(self.lease(number))
            expected = catalog.manifest(number)
            for tree in catalog.trees:
                if tree.has(VERSIONS, number):
                    verify_version(tree.folder(VERSIONS, number), expected)
            for kind in (VERSIONS, STATES):
                if catalog.archive is not None and catalog.archive.has(kind, number):
                    catalog.archive.verify(kind, number)

    def readable(self, version: Target) -> Path:
        """A folder that holds a version's two PEFT files, on tmpfs or in the archive; every copy is verified first."""
        number = self._number(version)
        self.verify(number)
        return self.folder(number)

    def folder(self, version: Target) -> Path:
        """Where a version's two PEFT files lie, on tmpfs or else in the archive; nothing is verified."""
        return self._looking().folder(self._number(version))

    @contextmanager
    def reading(self, version: Target) -> Iterator[Path]:
        """A folder that holds a version's two PEFT files: on tmpfs, leased while the block runs, or in the archive.

        Nothing is verified. Retention may remove the archived folder meanwhile; files that are open then stay whole."""
        number = self._number(version)
        with ExitStack() as held:
            try:
                folder = held.enter_context(self.lease(number)).path
            except UnknownVersion:
                archive = self._looking().archive
                if archive is None or not archive.has(VERSIONS, number):
                    raise
                folder = archive.folder(VERSIONS, number)
            yield folder

    @property
    def numbers(self) -> list[int]:
        """Every version with a copy somewhere, those that cannot be read included."""
        return self._looking().numbers()

    @property
    def states(self) -> list[int]:
        """Every version whose trainer state is kept."""
        return self._looking().states()

    def prunable(self, retention: Retention) -> tuple[list[int], list[int]]:
        """What `prune()` by these rules would remove for good: versions, and trainer states."""
        catalog = self._looking()
        here, numbers, states = catalog.root.numbers(VERSIONS), {*catalog.numbers()}, {*catalog.states()}
        going = states - catalog.kept(retention, "state", states)
        stay = catalog.kept(retention, "tmpfs", here).intersection(here)
        stay |= {number for number in here if number not in stay and is_leased(catalog.root.folder(VERSIONS, number))}
        if catalog.archive is not None:
            stay |= catalog.kept(retention, "archive", numbers) | (states - going)
        return sorted(numbers - stay), sorted(going)

    @property
    def missing(self) -> list[int]:
        """Versions without a copy that no retention removed: deleted by another program, or lost with the tmpfs."""
        catalog = self._looking()
        return sorted(catalog.journal.published.keys() - set(catalog.numbers()))

    @property
    def damaged_lines(self) -> tuple[int, ...]:
        """Lines of the journal, counted from 1, that cannot be read: what they held of the run's history is lost."""
        return tuple(self._looking().journal.damaged_lines)

    def metrics(self, version: Target) -> dict[str, Any]:
        """Everything recorded of a version."""
        return self._looking().journal.metrics_of(self._number(version))

    @property
    def pins(self) -> frozenset[int]:
        """Versions that retention leaves alone."""
        return frozenset(self._looking().journal.pins)

    @contextmanager
    def lease(self, version: Target) -> Iterator[AdapterVersion]:
        """Keep a version on tmpfs while the block runs."""
        held = self.acquire(version)
        try:
            yield held
        finally:
            self.release(held.number)

    def acquire(self, version: Target) -> AdapterVersion:
        """Keep a version that is on tmpfs there until `release`, counted. A process that dies holds nothing."""
        number = self._number(version)
        with self._mutex:
            catalog = self._looking()
            if not catalog.has_manifest(number):
                raise UnknownVersion(catalog.why_not_on_tmpfs(number))
            catalog.leases.acquire(number, catalog.root.folder(VERSIONS, number))
            return catalog.version(number)

    def release(self, version: Target) -> None:
        """End one `acquire`."""
        with self._mutex:
            self._catalog.leases.release(self._number(version))

    def load_state(self, version: Target) -> dict[str, Path] | None:
        """The files of a version's trainer state by name (`state.json` holds its meta), verified; None when not kept.

        The writer waits for one that is on its way."""
        archive, number = self._catalog.archive, self._number(version)
        if archive is None or not archive.has(STATES, number):
            return None
        archive.verify(STATES, number)
        return {path.name: path for path in sorted(archive.folder(STATES, number).iterdir()) if path.name != SUMS_FILE}

    def _looking(self) -> Catalog:
        """The catalog, with what a writer elsewhere has added since the last look."""
        if self._follow:
            with self._mutex:
                self._catalog.journal.refresh()
        return self._catalog

    def _number(self, to: Target) -> int:
        """The number that `to` names, kept or not; `ConfigError` or `UnknownVersion` says what there is to name."""
        match parse_target(to):
            case AdapterVersion() as version:
                here = self._catalog.journal.published.get(version.number)
                if here is not None and here.digest != version.digest:
                    raise UnknownVersion(f"{to} is from another store: version {version.number} here has other bytes")
                return version.number
            case int(number):
                return number
            case "head" | "parent" as word:
                if (head := self.head) is None:
                    raise UnknownVersion(f"no version was promoted yet, so there is no {word!r}")
                if (named := head.number if word == "head" else head.parent) is None:
                    raise UnknownVersion(f"{head} is the first version and has no parent; name a version by its number")
                return named
            case word:
                return _best(self, best_metric(self) if word == "best" else word.removeprefix("best:"))

    def list(self) -> list[AdapterVersion]:
        """Every version with a copy somewhere, in order of number; a damaged one is `verify`'s to explain."""
        catalog, found = self._looking(), []
        for number in catalog.numbers():
            with suppress(UnknownVersion, StoreCorrupt):
                found.append(catalog.version(number))
        return found


def best_metric(store: StoreView) -> str:
    """What "best" goes by: the held-out reward where two kept versions have one (one is no choice), else the reward."""
    held_out = "eval/reward"
    measured = [is_score(store.metrics(version.number).get(held_out)) for version in store.list()]
    return held_out if sum(measured) > 1 else "reward"


def _best(store: StoreView, metric: str) -> int:
    """The version that made the best completions; of equals the newest, as in retention."""
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    metrics = {version.number: store.metrics(version.number) for version in store.list()}
    scores = {number: sign * values[name] for number, values in metrics.items() if is_score(values.get(name))}
    if not scores:
        recorded = sorted({key for values in metrics.values() for key, value in values.items() if is_score(value)})
        known = f"no kept version has a recorded {name!r}; recorded are: {', '.join(recorded) or 'none'}"
        fix = f"record it with store.record(version, **{{{name!r}: 0.5}}), name another as 'best:METRIC'"
        raise UnknownVersion(f"{known}: {fix}, or a version by its number")
    return max(scores, key=lambda number: (scores[number], number))
