"""The versions that an engine has loaded."""

from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.requests import require_version
from lora_grpo.errors import DeliveryError, UnknownVersion

_Loaded = TypeVar("_Loaded", bound=Any)


class LoadedVersions(Generic[_Loaded]):
    """What an engine has of each version (its `version`), by path, least recently used first."""

    def __init__(self) -> None:
        # Replaced and never changed: who reads it in another thread has one state of it, and misses no version.
        self._by_path: dict[Path, _Loaded] = {}

    def all(self) -> tuple[_Loaded, ...]:
        return tuple(self._by_path.values())

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        return tuple(loaded.version for loaded in self.all())

    def find(self, version: AdapterVersion) -> _Loaded:
        """Raises `UnknownVersion` for one that is not loaded."""
        found = self._by_path.get(require_version(version).path)
        if found is None or found.version.digest != version.digest:
            held = ", ".join(map(str, self.versions)) or "none"
            raise UnknownVersion(f"{version} is not loaded (loaded: {held}); call engine.load(version) first")
        return found

    def known(self, version: AdapterVersion) -> _Loaded | None:
        """None for one that is not loaded. Raises `DeliveryError` where its path was loaded with other bytes."""
        known = self._by_path.get(require_version(version).path)
        if known is not None and known.version.digest != version.digest:
            raise DeliveryError(f"{version.path} is loaded as {known.version} with other bytes; a path must not change")
        return known

    def add(self, loaded: _Loaded) -> None:
        """As the most recently used; one that is there already becomes it."""
        path = loaded.version.path
        self._by_path = {**{other: known for other, known in self._by_path.items() if other != path}, path: loaded}

    def remove(self, loaded: _Loaded) -> None:
        """Where it is there: another load of the same version, which failed, takes nothing away."""
        self._by_path = {path: known for path, known in self._by_path.items() if known is not loaded}
