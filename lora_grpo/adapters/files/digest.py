"""One digest for an adapter: xxh3_128 over its files' sorted names, lengths and contents.

It is fast enough to be taken at every step and again wherever bytes cross a boundary. It guards against damage and
mix-ups, not against an attacker; the archive adds sha256 beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import xxhash

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Any C-contiguous buffer; what `memoryview()` takes."""
Files: TypeAlias = Mapping[str, Sequence[Buffer]]
"""Files by name, each as buffers that lie end to end."""

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


def digest_buffers(files: Files) -> str:
    """Digest of files held as buffers: 32 hex digits, the same however a file is split into buffers."""
    digest = AdapterDigest()
    for name in sorted(files):
        views = [memoryview(buffer).cast("B") for buffer in files[name]]
        digest.file(name, sum(view.nbytes for view in views))
        for view in views:
            digest.update(view)
    return digest.hexdigest()
