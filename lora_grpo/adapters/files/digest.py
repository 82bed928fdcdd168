"""One digest for an adapter: xxh3_128 over its files' sorted names, lengths and contents.

It is fast enough to be taken at every step and again wherever bytes cross a boundary. It guards against damage and
mix-ups, not against an attacker; the archive adds sha256 beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import xxhash

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Any C-contiguous buffer; what `memoryview()` takes."""

CHUNK_BYTES = 1 << 20


class AdapterDigest:
    """The digest of a folder, fed file by file in sorted order of the names."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def file(self, name: str, size_bytes: int) -> None:
        """Start a file. The length goes in first, so no two folders share a stream of bytes."""
        self._hash.update(f"{name}\0{size_bytes}\0".encode())

    def update(self, data: Buffer) -> None:
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_buffers(files: Mapping[str, Sequence[Buffer]]) -> str:
    """Digest of files held as buffers: 32 hex digits, the same however a file is split into buffers."""
    digest = AdapterDigest()
    for name in sorted(files):
        views = [memoryview(buffer).cast("B") for buffer in files[name]]
        digest.file(name, sum(view.nbytes for view in views))
        for view in views:
            digest.update(view)
    return digest.hexdigest()


def digest_directory(
    path: str | Path, *, skip: frozenset[str] = frozenset({"version.json"}), held: Mapping[str, Buffer] | None = None
) -> str:
    """Digest of a version's directory, equal to `digest_buffers` of its files; the manifest is not part of it.

    Files named in `held` are taken from the buffers given there (their mappings, say) and not read again.
    """
    folder = Path(path)
    digest = AdapterDigest()
    chunk = memoryview(bytearray(CHUNK_BYTES))
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name in skip:
            continue
        if held is not None and file.name in held:
            whole = memoryview(held[file.name]).cast("B")
            digest.file(file.name, whole.nbytes)
            digest.update(whole)
            continue
        with open(file, "rb", buffering=0) as stream:
            digest.file(file.name, file.stat().st_size)
            while count := stream.readinto(chunk):
                digest.update(chunk[:count])
    return digest.hexdigest()
