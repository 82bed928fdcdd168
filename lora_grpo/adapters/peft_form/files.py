"""Reads a published PEFT directory back: what the engine is about to be given, checked before it gets it."""

import math
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files.disk import Buffer, digest_pieces, open_regular, parse_json
from lora_grpo.adapters.version import CONFIG_FILE, WEIGHTS_FILE, AdapterVersion
from lora_grpo.errors import DeliveryError, UnknownVersion

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; its bytes are counted in the payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class AdapterFile:
    """A published adapter: tensor entries by name in payload order, the mapped payload, and its ranks by module. Every
    name is `base_model.model.PATH.lora_A.weight` or its B, every A has its B, and the scale is 1 throughout."""

    header: bytes
    entries: Mapping[str, TensorEntry]
    payload: memoryview
    paths: tuple[str, ...]
    dtype: str
    mapped: memoryview
    """The whole tensors file, of which `payload` is the end. The mapping is private and outlives the file."""
    config: bytes

    def digest_with(self, payload: Iterable[Buffer]) -> str:
        """The version's digest, were `payload`, in pieces, what its tensors file holds after the header."""
        tensors = chain([self.mapped[: len(self.mapped) - len(self.payload)]], payload)
        files = (CONFIG_FILE, len(self.config), [self.config]), (WEIGHTS_FILE, len(self.mapped), tensors)
        return digest_pieces(files)


def open_adapter(version: AdapterVersion) -> AdapterFile:
    """Map a version's files and check them against each other; `DeliveryError` names the module or value."""
    if not version.path.is_dir():
        back = f"store.restore({version.number}) brings back what the archive keeps"
        raise UnknownVersion(f"{version} is no longer in {version.path.parent}: pruned, or its store closed; {back}")
    try:
        with open(open_regular(version.path / CONFIG_FILE), "rb") as stream:
            config = stream.read()
        header, mapped = _map(version.path / WEIGHTS_FILE)
        entries, paths, dtype, payload_bytes = _layout(header, config)
        payload = mapped[8 + len(header) :]
        if payload_bytes != len(payload):
            raise ValueError(f"{WEIGHTS_FILE} is truncated or empty ({len(payload)} bytes of tensors)")
    except (OSError, ValueError, KeyError) as error:
        raise DeliveryError(f"{version} at {version.path} cannot be served: {error}") from error
    return AdapterFile(header, entries, payload, paths, dtype, mapped, config)


@lru_cache(maxsize=8)
def _layout(header: bytes, config: bytes) -> tuple[Mapping[str, TensorEntry], tuple[str, ...], str, int]:
    """Entries, paths, dtype and bytes: checked once for all versions of a run, which differ in their payload only."""
    entries = _entries(header)
    if not entries:
        raise ValueError(f"{WEIGHTS_FILE} is truncated or empty: it has no tensor")
    paths = _paths(entries)
    _check_config(_mapping(config, CONFIG_FILE), entries, paths)
    dtypes = {entry.dtype for entry in entries.values()}
    if len(dtypes) != 1:
        raise ValueError(f"it mixes dtypes {sorted(dtypes)}; publish it with one")
    return entries, paths, dtypes.pop(), _payload_bytes(entries)


def _payload_bytes(entries: Mapping[str, TensorEntry]) -> int:
    end = 0
    for name, entry in entries.items():
        length = math.prod(entry.shape) * _ITEM_BYTES.get(entry.dtype, 0)
        if (entry.start, entry.end) != (end, end + length):
            place = f"bytes {entry.start} to {entry.end}, where {end} to {end + length} is its place"
            raise ValueError(f"tensor {name!r} ({entry.dtype}, shape {entry.shape}) lies at {place}")
        end = entry.end
    return end


def _map(path: Path) -> tuple[bytes, memoryview]:
    with open(open_regular(path), "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    length = int.from_bytes(view[:8], "little")
    if length > len(view) - 8:
        raise ValueError(f"{path.name} claims a header of {length} bytes in a file of {len(view)}")
    return bytes(view[8 : 8 + length]), view


def _entries(header: bytes) -> dict[str, TensorEntry]:
    fields = _mapping(header, "the header of its tensors")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata of its tensors is not a table of texts")
    entries = {name: _entry(name, field) for name, field in fields.items()}
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _mapping(content: bytes, what: str) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _entry(name: str, field: Any) -> TensorEntry:
    match field:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
            if all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                return TensorEntry(dtype, tuple(shape), start, end)
    raise ValueError(f"tensor {name!r} has no dtype, shape and place, but {ascii(field)[:80]}")


def _paths(entries: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    paths: dict[str, set[str]] = {}
    for name in entries:
        kind = next((kind for kind in (_A, _B) if name.endswith(kind)), None)
        if kind is None or not name.startswith(PREFIX):
            raise ValueError(f"tensor {name!r} is not named {PREFIX}MODULE.lora_A.weight or .lora_B.weight")
        if len(entries[name].shape) != 2:
            raise ValueError(f"tensor {name!r} has shape {entries[name].shape}; A and B are matrices")
        paths.setdefault(name.removeprefix(PREFIX).removesuffix(kind), set()).add(kind)
    for path, kinds in paths.items():
        if kinds != {_A, _B}:
            raise ValueError(f"{path} has {' and '.join(sorted(kinds))} only; A and B come in pairs")
    return tuple(paths)


def _check_config(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], paths: tuple[str, ...]) -> None:
    named, patterns = config.get("target_modules"), [config.get(name) for name in ("rank_pattern", "alpha_pattern")]
    if not isinstance(named, list) or not all(isinstance(target, str) for target in named):
        raise ValueError(f"its config names the modules as {ascii(named)[:80]}; they are listed one by one")
    if not all(isinstance(pattern, dict | None) for pattern in patterns):
        raise ValueError(f"its config has rank and alpha patterns {ascii(patterns)[:80]}; they are tables")
    if odd := sorted({*named} ^ {*paths}):
        where = "named by the config but missing from the file" if odd[0] in named else "not named by the config"
        raise ValueError(f"module {odd[0]} is {where}")
    if config.get("use_rslora") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError("its config asks for rsLoRA, DoRA or bias; the serving form has none of them")
    for path in paths:
        key, rank = re.escape(path), entries[f"{PREFIX}{path}{_A}"].shape[0]
        stated = (config.get("rank_pattern") or {}).get(key, config.get("r"))
        alpha = (config.get("alpha_pattern") or {}).get(key, config.get("lora_alpha"))
        rank_b = entries[f"{PREFIX}{path}{_B}"].shape[1]
        if type(stated) is not int or not (rank == stated == rank_b):
            raise ValueError(f"{path} has A of rank {rank} and B of rank {rank_b}; its config says {stated!a:.80}")
        if not isinstance(alpha, int | float) or alpha is True or not abs(alpha - rank) <= 1e-9 * rank:
            raise ValueError(f"{path} has alpha {alpha!a:.80} at rank {rank}; the serving form's scale is 1")
