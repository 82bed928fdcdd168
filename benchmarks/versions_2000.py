"""Publish and prune thousands of versions; time per publish, memory and tmpfs use must not grow with their number.

    python benchmarks/versions_2000.py [--versions 2000] [--mib 1.0]

Each round is a training step's worth of store work: publish, promote, record, archive a trainer state, prune. Prints a
table of the run in tenths, and as the last line of stdout one JSON object with the slopes of time per publish, time per
round, resident memory and bytes under the root: least-squares lines through the tenths' medians (a busy disk makes
outliers), each as a change per 1,000 versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_archived, keep_best, keep_latest, keep_trainer_state
from lora_grpo.errors import ConfigError

RETENTION = (
    keep_latest(8) | keep_archived(keep_latest(16) | keep_best("reward", 4)) | keep_trainer_state(keep_latest(2))
)
TENTHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=2000)
    parser.add_argument("--mib", type=float, default=1.0, help="size of an adapter")
    arguments = parser.parse_args()
    if arguments.versions < 2 * TENTHS:
        raise ConfigError(f"--versions={arguments.versions} must be at least {2 * TENTHS}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, tempfile.TemporaryDirectory() as run:
        rounds = measure(Path(root) / "store", Path(run) / "run", arguments.versions, int(arguments.mib * 2**20))
    report(rounds)


def measure(root: Path, run: Path, versions: int, size_bytes: int) -> list[tuple[float, ...]]:
    """Seconds of publish and promote, of the whole round, resident MiB and tmpfs MiB, round by round."""
    draw = random.Random(0)
    body = bytearray(draw.randbytes(size_bytes))
    # Room for every figure from the start, so that what grows is the store.
    rounds = [array("d", [0.0] * versions) for _ in range(4)]
    with AdapterStore(root, run, retention=RETENTION) as store:
        for step in range(versions):
            body[:8] = step.to_bytes(8, "little")
            # The store keeps a state's bytes until they are on disk, so every state has its own.
            state = {"state.safetensors": [bytes(body)]}
            files = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [memoryview(body)]}
            started = time.perf_counter()
            version = store.publish(files, step=step)
            store.promote(version)
            published = time.perf_counter() - started
            store.record(version, reward=draw.random())
            store.archive_state(version, state, {"step": step})
            store.prune()
            seconds = time.perf_counter() - started
            # Outside the clock: so that memory shows what is kept, not how far a slow disk is behind.
            store.flush()
            for column, value in zip(rounds, (published, seconds, resident_mib(), used_mib(root)), strict=True):
                column[step] = value
    return list(zip(*rounds, strict=True))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def used_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def report(rounds: Sequence[tuple[float, ...]]) -> None:
    # The first rounds fill the places that retention then keeps full.
    skipped = min(100, len(rounds) // TENTHS)
    settled = rounds[skipped:]
    print(f"{'versions':>16} {'publish ms':>11} {'round ms':>9} {'RSS MiB':>9} {'tmpfs MiB':>10}   (medians)")
    tenth = len(settled) // TENTHS
    medians = []
    for start in range(0, tenth * TENTHS, tenth):
        part = settled[start : start + tenth]
        medians.append(tuple(statistics.median(column) for column in zip(*part, strict=True)))
        publish, whole, resident, used = medians[-1]
        span = f"{skipped + start + 1:>7} to {skipped + start + tenth:>5}"
        print(f"{span} {1e3 * publish:>11.2f} {1e3 * whole:>9.2f} {resident:>9.1f} {used:>10.1f}")
    middles = [start + tenth / 2 for start in range(0, tenth * TENTHS, tenth)]
    slopes = [1000 * statistics.linear_regression(middles, column).slope for column in zip(*medians, strict=True)]
    print(
        json.dumps(
            {
                "versions": len(rounds),
                "publish_ms_median": round(1e3 * statistics.median(row[0] for row in settled), 3),
                "publish_ms_per_1000_versions": round(1e3 * slopes[0], 3),
                "round_ms_median": round(1e3 * statistics.median(row[1] for row in settled), 3),
                "round_ms_per_1000_versions": round(1e3 * slopes[1], 3),
                "rss_mib_per_1000_versions": round(slopes[2], 3),
                "tmpfs_mib_per_1000_versions": round(slopes[3], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
