"""The versions in use: changed in the engine's loop alone, and read from any thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.requests import find_loaded, loaded_from_its_path
from lora_grpo.engines.server.replica import Served


class InUse:
    """By path, least recently used first."""

    def __init__(self) -> None:
        # Replaced and never changed: who reads it in another thread has one state of it, and misses no version.
        self._by_path: dict[Path, Served] = {}

    def all(self) -> tuple[Served, ...]:
        return tuple(self._by_path.values())

    def known(self, version: AdapterVersion) -> Served | None:
        """As `loaded_from_its_path`."""
        return loaded_from_its_path(self._by_path, version)

    def find(self, version: AdapterVersion) -> Served:
        """As `find_loaded`."""
        return find_loaded(self._by_path, version)

    def add(self, served: Served) -> None:
        """As the most recently used; one that is there already becomes it."""
        self._by_path = {**self._without(served), served.version.path: served}

    def remove(self, served: Served) -> None:
        self._by_path = self._without(served)

    def _without(self, served: Served) -> dict[Path, Served]:
        return {path: known for path, known in self._by_path.items() if path != served.version.path}

    @contextmanager
    def using(self, versions: Sequence[AdapterVersion | None]) -> Iterator[list[Served | None]]:
        """The versions as they are served (None: the base), kept in use meanwhile and made the most recently used.

        Raises `UnknownVersion` for one that is not loaded.
        """
        wanted = [None if version is None else self.find(version) for version in versions]
        distinct = list(dict.fromkeys(served for served in wanted if served is not None))
        for served in distinct:
            self.add(served)
            served.users += 1
        try:
            yield wanted
        finally:
            for served in distinct:
                served.users -= 1
