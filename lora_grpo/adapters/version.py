"""`AdapterVersion`: the one noun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One published adapter; never changes after it is published.

    `number` counts from 1 and is never reused, not even after pruning. `parent` is the version that training went
    on from (None for the first). `path` is an immutable PEFT directory for as long as the version is kept.
    `digest` covers every byte of the two PEFT files. `step` is the caller's training step. `created_at` is seconds
    since the epoch.

    >>> version = store.get("head")
    >>> print(version, version.parent, (version.path / "adapter_config.json").is_file())
    v2 1 True
    """

    number: int
    parent: int | None
    path: Path
    digest: str
    step: int
    created_at: float

    def __str__(self) -> str:
        return f"v{self.number}"
