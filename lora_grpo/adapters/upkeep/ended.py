"""Roots that killed processes left on tmpfs: memory that nothing else frees before the next reboot."""

from __future__ import annotations

import shutil
import warnings
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from lora_grpo.adapters.files.disk import Tree, folder_name, read_number, replace_file
from lora_grpo.adapters.files.layout import VERSIONS, Identity
from lora_grpo.adapters.files.locks import WriterLock, is_ended, is_free, is_leased
from lora_grpo.adapters.files.places import ASIDE
from lora_grpo.adapters.upkeep.opening import is_same

SERVING = "lora-grpo-engine-"
"""Beginning of the name of a folder whose process has servers load versions from their paths."""


def clear_ended(home: Path) -> None:
    """Remove the roots in `home` that stores chose, nobody uses, and whose every version their run's archive has.

    Others are named in a warning: what they hold may be nowhere else. Where a killed process had servers load versions,
    all stay: those read them until the next engine for servers has them forget what it left, and removes its folder.
    """
    if any(map(is_free, home.glob(f"{SERVING}*"))):
        return
    kept = [root for root in sorted(home.glob("lora-grpo-*")) if is_ended(root) and not _is_settled(root)]
    if kept:
        mib = sum(file.stat().st_size for root in kept for file in root.rglob("*") if file.is_file()) / (1 << 20)
        warnings.warn(
            f"killed processes left {mib:.1f} MiB of versions in memory that may be nowhere else, in "
            f"{', '.join(map(str, kept))}: resume their runs, or open them with AdapterStore(FOLDER); those that you "
            "do not need any more, remove with rm -r",
            RuntimeWarning,
            stacklevel=4,
        )


def _is_settled(root: Path) -> bool:
    """Whether there is nothing to tell of it: it is no root that a store chose, somebody uses it, or it is gone now."""
    lock = WriterLock()
    with suppress(OSError), closing(lock):
        there = Identity.read(root)
        if there is None or not there.own_root:
            return True
        run = None if there.other is None else Path(there.other)
        # As an opening does: the run directory first.
        for folder in (run, root):
            if folder is not None and folder.is_dir():
                lock.take(folder)
        tree = Tree(root, (VERSIONS,), sync=False)
        numbers = tree.numbers(VERSIONS)
        if Identity.read(root) != there or any(is_leased(tree.folder(VERSIONS, number)) for number in numbers):
            return True
        last = read_number(root / "NUMBERS")
        if last is None or tree.leftovers() or any(root.glob(f"{ASIDE}*")) or not _has_all(run, tree, numbers, there):
            return False
        if run is not None:
            # So that numbers go on without a gap, as after a clean end. Not waited for: who resumes the run meanwhile
            # has little patience with a lock, and a gap does no harm.
            replace_file(run / "NUMBERS", f"{last}\n".encode(), sync=False)
        shutil.rmtree(root)
    return True


def _has_all(run: Path | None, tree: Tree, numbers: list[int], there: Identity) -> bool:
    """Whether `run`, whose current root this is, has every version of it; without a run: whether there is none."""
    if run is None:
        return not numbers
    identity = Identity.read(run)
    if identity is None or replace(identity, other=there.other, home=None) != there or identity.other != str(tree.path):
        return False
    return all(is_same(tree.folder(VERSIONS, number), run / VERSIONS / folder_name(number)) for number in numbers)
