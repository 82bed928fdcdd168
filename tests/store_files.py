"""Adapters made of bytes: the store moves them and never looks inside."""

from __future__ import annotations

import random
from pathlib import Path

from lora_grpo.adapters.files.disk import digest_buffers


def adapter(seed: int, size_bytes: int = 3000) -> dict[str, list[bytes | memoryview]]:
    """Two files, the larger one in several buffers, different for every seed."""
    body = random.Random(seed).randbytes(size_bytes)
    cut = size_bytes // 3
    return {
        "adapter_model.safetensors": [body[:cut], memoryview(body)[cut:]],
        "adapter_config.json": [f'{{"seed": {seed}}}'.encode()],
    }


def content(files: dict[str, list[bytes | memoryview]]) -> dict[str, bytes]:
    return {name: b"".join(buffers) for name, buffers in files.items()}


def on_disk(folder: Path) -> dict[str, bytes]:
    """The PEFT files of a version's folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "version.json"}


def digest_of(folder: Path) -> str:
    """The digest of what lies in a version's folder."""
    return digest_buffers({name: [held] for name, held in on_disk(folder).items()})
