"""Where models and caches go: memory if it has room for them, or the temporary folder."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

LARGE_BYTES = 16 << 30
"""What the large model's files take, the small one's and the caches with them."""
TINY_BYTES = 64 << 20
SHARED = Path("/dev/shm")
NAME = "lora-grpo-gpu"
FINISHED = "config.json"


@dataclass(frozen=True)
class Place:
    """`refusal` says why no step with the large model can run; empty where they can."""

    models: Path
    notes: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def caches(self) -> Path:
        return self.models / "caches"


def choose_place(asked: Path | None, device: str) -> Place:
    """The folder that was asked for, or the first of memory and the temporary folder that has room."""
    needed = TINY_BYTES if device == "cpu" else LARGE_BYTES
    folders = [asked] if asked else [SHARED / NAME, Path(tempfile.gettempdir()) / NAME]
    free = {folder: _free_bytes(folder) for folder in folders}
    chosen = next((folder for folder in folders if _is_made(folder) or free[folder] >= needed), None)
    told = ", ".join(f"{size / (1 << 30):.1f} GiB are free for {folder}" for folder, size in free.items())
    if chosen is None:
        largest = max(folders, key=lambda folder: free[folder])
        refusal = f"the 7B model needs {needed >> 30} GiB for its files: {told}; name a folder with --models DIR"
        return Place(largest.resolve(), [f"Models and caches were in {largest}: {told}."], refusal)
    notes = [] if chosen is folders[0] else [f"Models and caches were in {chosen}, not in memory: {told}."]
    return Place(chosen.resolve(), notes)


def _is_made(folder: Path) -> bool:
    """An earlier call has made the large model there."""
    return any(folder.glob(f"qwen2.5-7b-seed*/{FINISHED}"))


def _free_bytes(folder: Path) -> int:
    there = next(one for one in (folder, *folder.resolve().parents) if one.is_dir())
    return shutil.disk_usage(there).free
