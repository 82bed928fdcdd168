"""What lies where on disk: as "Files" in examples/docs/versions.md says, and beside that, in both halves of a store,

- `store.json`: format number, the run's id, the path of the other half and of the run directory itself (so that a copy
  is told from the original), whether the store chose the root, and which opening wrote it: a generation that counts
  openings and a random token, the same in both halves. The half with the lower generation is out of date.
- `LOCK`: the one writer's kernel lock (`flock`; it goes when the process goes), and who that is.
- `staging/` and `trash/`: folders on their way in or out; whatever the next writer finds there, it deletes.

Each line of the journal has a checksum. It is the truth for metrics, pins and past promotions, and lies in the root
where there is no run directory; for which versions exist the folders are. Where the tmpfs is gone, the journal's last
promotion of a version that was archived takes the place of `HEAD`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files import disk
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
    def from_mapping(cls, values: Mapping[str, Any]) -> "Manifest":
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no manifest."""
        manifest = cls(**{name: values[name] for name in cls.__slots__})
        sizes = manifest.sizes
        numbers = [manifest.number] if manifest.parent is None else [manifest.number, manifest.parent]
        if not (
            all(disk.is_number(number) for number in numbers)
            and (type(manifest.digest), type(manifest.step), type(sizes)) == (str, int, dict)
            and abs(manifest.created_at) < 1e11  # what is not finite is not below it either
            and sizes.keys() == set(PEFT_FILES)
            and all(type(size) is int and size >= 0 for size in sizes.values())
        ):
            raise ValueError("its fields are not the fields of a version")
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a version's folder; `StoreCorrupt` for a damaged one, and where there is none."""
    path = folder / MANIFEST_FILE
    if (manifest := disk.read_record(path, Manifest.from_mapping)) is None:
        raise StoreCorrupt(f"{path} is gone; did another program delete it?")
    if disk.folder_name(manifest.number) != folder.name:
        raise StoreCorrupt(f"{path} says it is version {manifest.number}, but its folder is {folder.name}")
    return manifest


@dataclass(frozen=True, slots=True)
class Identity:
    """What `store.json` says. `other`: the other half. `own_root`: the store chose the root itself, and clears it on
    closing. `home`: where the run directory lay then (None: this is the root's). `generation` and `token`: which
    opening wrote it (0 and "": none)."""

    run_id: str
    other: str | None
    own_root: bool
    home: str | None
    generation: int
    token: str

    def write(self, folder: Path, *, sync: bool) -> None:
        content = {"format": FORMAT, **asdict(self)}
        disk.replace_file(folder / "store.json", json.dumps(content).encode() + b"\n", sync=sync)

    def is_older_than(self, other: "Identity") -> bool:
        """Whether this half was not there when the other was last opened; of two equally old ones that differ, yes."""
        tokens_differ = self.generation == other.generation and self.token != other.token
        return self.generation < other.generation or tokens_differ

    @classmethod
    def read(cls, folder: Path) -> "Identity | None":
        path = folder / "store.json"

        def build(values: Mapping[str, Any]) -> Identity:
            if values["format"] != FORMAT:
                raise StoreError(f"{path} has format {values['format']}; this release reads format {FORMAT}")
            found = cls(**{name: values[name] for name in cls.__slots__})
            texts = (found.run_id, found.other or "", found.home or "", found.token)
            plain = all(isinstance(text, str) and "\0" not in text for text in texts)
            if not plain or (type(found.own_root), type(found.generation)) != (bool, int):
                raise ValueError("its fields are not the fields of a store")
            return found

        return disk.read_record(path, build)
