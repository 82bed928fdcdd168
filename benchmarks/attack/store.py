"""Attacks on the store: kills, failing disks, spoiled files, broken adapters."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.attack import FOLDER, Outcome


def stopped_at_calls(seed: int, kills: int = 340, errors: int = 180) -> Outcome:
    """SIGKILL, or an error of the disk, at exact system calls; runs copied, moved and out of date among them."""
    from tests.crash.attack import attack

    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=FOLDER) as folder:
        result = attack(Path(folder), seed, kills, errors)
    faults = [json.dumps(fault) for fault in result["wrong"]]
    return Outcome("kills and failing disks at exact calls", kills + errors, faults, result["table"])


def broken_adapters(seed: int, adapters: int = 1835) -> Outcome:
    """Published and opened as an engine would: refused by name, and the promoted version stays."""
    from tests.crash.attack import fuzz

    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=FOLDER) as folder:
        result = fuzz(Path(folder), seed, adapters)
    return Outcome("broken adapters", adapters, [json.dumps(fault) for fault in result["wrong"]], result["table"])


def spoiled_files(seed: int) -> Outcome:
    """Every file of a trained run, spoiled in every way: what each command makes of it."""
    from tests.crash.damage import KINDS, attack, files, trained

    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix=FOLDER) as folder,
        trained(Path(folder)) as run,
    ):
        tries = [(name, kind) for name in files(run) for kind in KINDS]
        result = attack(run, seed, tries)
    faults = [json.dumps(fault) for fault in result["wrong"]]
    return Outcome("spoiled files of a run, six commands", sum(result["table"].values()), faults, result["table"])
