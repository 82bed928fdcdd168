"""What lies where on disk.

The store has a root on tmpfs, and with `archive=` a durable run directory. Both hold:

- `store.json`: format number, the run's id, the path of the other of the two, whether the store chose the root.
- `LOCK`: the one writer's kernel lock (`flock`; it goes when the process goes) and, as JSON, who that is.
- `versions/000007/`: one immutable PEFT directory, `adapter_model.safetensors` and `adapter_config.json`, with
  `version.json` (number, parent, digest, step, created_at, sizes in bytes). The digest is xxh3_128 over the sorted
  file names, lengths and contents. The archived copy has the same bytes and a `SHA256SUMS` for `sha256sum -c`.
- `staging/` and `trash/`: folders on their way in or out; whatever the next writer finds there, it deletes.

Only in the root:

- `HEAD`: a symbolic link to the promoted version's folder. Where the tmpfs is gone, the journal's last promotion of
  a version that was archived takes its place.
- `NUMBERS`: the last number given out.

Only in the run directory:

- `NUMBERS`: no number above this one has been given out (reserved in blocks, fsynced).
- `states/000007/`: the trainer state of version 7, whatever files the trainer wrote, `state.json` and `SHA256SUMS`.
- `requests/`: what other processes ask of the writer, and its answers.
- `rollbacks.jsonl`: each rollback of the run (see `rollbacks.py`); `adapter.json`: the adapter's PEFT config and its
  scalings, for exports (see `export.py`).

In the run directory, or in the root when there is none:

- `journal.jsonl`: one event a line (publish, promote, record, pin, unpin, forget, state, forget_state). It is the
  truth for metrics, pins and past promotions; for which versions exist the folders are, and the journal is an index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapters import disk
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import StoreCorrupt, StoreError

FORMAT = 1
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_FILES = (CONFIG_FILE, ADAPTER_FILE)
MANIFEST_FILE = "version.json"
STATE_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
VERSIONS = "versions"
STATES = "states"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `version.json` says."""

    number: int
    parent: int | None
    digest: str
    step: int
    created_at: float
    sizes: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.fields(), indent=1) + "\n").encode()

    def version(self, path: Path) -> AdapterVersion:
        return AdapterVersion(self.number, self.parent, path, self.digest, self.step, self.created_at)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Manifest:
        return cls(**{name: values[name] for name in cls.__slots__})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a version's folder; `FileNotFoundError` without one, `StoreCorrupt` for a damaged one."""
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.from_mapping(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{path} is damaged: {error}") from error
    if disk.folder_name(manifest.number) != folder.name:
        raise StoreCorrupt(f"{path} says it is version {manifest.number}, but its folder is {folder.name}")
    return manifest


@dataclass(frozen=True, slots=True)
class Identity:
    """What `store.json` says: which run this is, and where its other half lies (None: there is none).

    `own_root`: the store chose the root itself, and clears it when it is closed.
    """

    run_id: str
    other: str | None
    own_root: bool

    def write(self, folder: Path, *, sync: bool) -> None:
        content = {"format": FORMAT, "run_id": self.run_id, "other": self.other, "own_root": self.own_root}
        disk.replace_file(folder / "store.json", json.dumps(content).encode() + b"\n", sync=sync)

    @classmethod
    def read(cls, folder: Path) -> Identity | None:
        path = folder / "store.json"
        content = disk.read_small(path)
        if content is None:
            return None
        try:
            values = json.loads(content)
            format_, identity = values["format"], cls(values["run_id"], values["other"], values["own_root"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt(f"{path} is damaged: {error}") from error
        if format_ != FORMAT:
            raise StoreError(f"{path} has format {format_}; this release reads format {FORMAT}")
        return identity
