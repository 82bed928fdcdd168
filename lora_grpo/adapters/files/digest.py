"""One digest for an adapter: xxh3_128 over its files' sorted names, lengths and contents.

It is fast enough to be taken at every step and again wherever bytes cross a boundary. It guards against damage and
mix-ups, not against an attacker; the archive adds sha256 beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import xxhash

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Any C-contiguous buffer; what `memoryview()` takes."""
Files: TypeAlias = Mapping[str, Sequence[Buffer]]
"""Files by name, each as buffers that lie end to end."""

CHUNK_BYTES = 1 << 20


def digest_pieces(files: Iterable[tuple[str, int, Iterable[Buffer]]]) -> str:
    """Digest of files in sorted order of their names, each a name, a length and bytes in pieces: 32 hex digits."""
    hashed = xxhash.xxh3_128()
    for name, size_bytes, pieces in files:
        # The length goes in first, so no two folders share a stream of bytes.
        hashed.update(f"{name}\0{size_bytes}\0".encode())
        for piece in pieces:
            hashed.update(piece)
    return hashed.hexdigest()


def digest_buffers(files: Files) -> str:
    """Digest of files held as buffers, the same however a file is split into buffers."""
    views = {name: [memoryview(buffer).cast("B") for buffer in files[name]] for name in sorted(files)}
    return digest_pieces((name, sum(view.nbytes for view in parts), parts) for name, parts in views.items())
