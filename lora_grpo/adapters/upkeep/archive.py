"""The durable half of a store: copies of versions and trainer states, each with its `SHA256SUMS`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.digest import CHUNK_BYTES, Buffer, Files, digest_pieces
from lora_grpo.adapters.files.disk import Tree, reported
from lora_grpo.adapters.files.layout import MANIFEST_FILE, STATES, SUMS_FILE, VERSIONS, Manifest
from lora_grpo.errors import StoreCorrupt


class Archive(Tree):
    """The run directory's folders. Everything is staged, fsynced, renamed, and the rename made durable."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, (VERSIONS, STATES), sync=True)

    def keep_version(self, manifest: Manifest, source: Path) -> None:
        """Copy a version from tmpfs. `StoreCorrupt` when tmpfs no longer holds what was published."""
        with reported(f"archiving version {manifest.number}"), self.staged(VERSIONS, manifest.number) as folder:
            sums = _copy_checked(source, folder, manifest, sync=True)
            self.write(folder, {SUMS_FILE: [_sums_text(sums)]})

    def bring_back(self, manifest: Manifest, root: Tree) -> None:
        """Copy a version to its old place on tmpfs, digest checked before it appears there."""
        number = manifest.number
        with reported(f"restoring version {number}"), root.staged(VERSIONS, number) as folder:
            _copy_checked(self.folder(VERSIONS, number), folder, manifest, sync=root.sync)

    def keep_state(self, number: int, contents: Files) -> None:
        with reported(f"archiving the trainer state of version {number}"), self.staged(STATES, number) as folder:
            sums = {name: _sha256(buffers) for name, buffers in contents.items()}
            self.write(folder, {**contents, SUMS_FILE: [_sums_text(sums)]})

    def verify(self, kind: str, number: int) -> None:
        """Compare every file of an archived folder with its `SHA256SUMS`; `StoreCorrupt` names what differs."""
        folder = self.folder(kind, number)
        with reported(f"reading {folder}"):
            expected = _read_sums(folder / SUMS_FILE)
            found = set(os.listdir(folder)) - {SUMS_FILE}
            if found != set(expected):
                raise StoreCorrupt(f"{folder} holds {sorted(found)}, but its {SUMS_FILE} names {sorted(expected)}")
            for name, sha256 in expected.items():
                if _sha256(_chunks(folder / name)) != sha256:
                    raise StoreCorrupt(f"{folder / name} differs from what was written (sha256)")


def verify_version(folder: Path, expected: Manifest) -> None:
    """Compare a version's folder with what was published; `StoreCorrupt` names what differs."""
    with reported(f"reading {folder}"):
        manifest = disk.read_small(folder / MANIFEST_FILE)
        if manifest != expected.to_bytes():
            raise StoreCorrupt(
                f"{folder / MANIFEST_FILE} {'is gone' if manifest is None else 'differs from what was published'}"
            )
        _check_sizes(folder, expected)
        sizes = sorted(expected.sizes.items())
        _check_digest(folder, expected, digest_pieces((name, size, _chunks(folder / name)) for name, size in sizes))


def _copy_checked(source: Path, target: Path, manifest: Manifest, *, sync: bool) -> dict[str, str]:
    """Copy a version's files; their sha256 by name. What is copied is what was published, or `StoreCorrupt`."""
    _check_sizes(source, manifest)
    sums = {MANIFEST_FILE: _sha256([manifest.to_bytes()])}

    def copied(name: str) -> Iterator[Buffer]:
        hashed = hashlib.sha256()
        descriptor = os.open(target / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb", buffering=0) as stream:
            for piece in _chunks(source / name):
                hashed.update(piece)
                stream.write(piece)
                yield piece
            if sync:
                os.fsync(descriptor)
        sums[name] = hashed.hexdigest()

    sizes = sorted(manifest.sizes.items())
    _check_digest(source, manifest, digest_pieces((name, size, copied(name)) for name, size in sizes))
    disk.write_file(target / MANIFEST_FILE, [manifest.to_bytes()], sync=sync)
    return sums


def _chunks(path: Path) -> Iterator[memoryview]:
    """A file's bytes, each piece good until the next."""
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with open(disk.open_regular(path), "rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            yield chunk[:count]


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, size in manifest.sizes.items():
        try:
            found = os.stat(folder / name).st_size
        except FileNotFoundError:
            raise StoreCorrupt(f"{folder / name} is gone; did another program remove it?") from None
        if found != size:
            raise StoreCorrupt(f"{folder / name} has {found} bytes; {size} were published")


def _check_digest(folder: Path, manifest: Manifest, found: str) -> None:
    if found != manifest.digest:
        raise StoreCorrupt(
            f"{folder} has digest {found}; version {manifest.number} was published with {manifest.digest}"
        )


def _sha256(buffers: Iterable[Buffer]) -> str:
    hashed = hashlib.sha256()
    for buffer in buffers:
        hashed.update(buffer)
    return hashed.hexdigest()


def _sums_text(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def _read_sums(path: Path) -> dict[str, str]:
    content = disk.read_small(path)
    lines = [] if content is None else content.decode(errors="replace").splitlines()
    if not lines or any(len(line.split("  ", 1)) != 2 for line in lines):
        raise StoreCorrupt(f"{path} is {'missing' if content is None else 'damaged'}")
    return {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
