"""Publish and prune thousands of versions; time per publish, memory and tmpfs use must not grow with their number.

    python benchmarks/versions_2000.py [--versions 2000] [--mib 1.0]

Each round is a training step's worth of store work: publish, promote, record, archive a trainer state, prune. Prints a
table of the run in tenths, and as the last line of stdout one JSON object with the three slopes: a least-squares line
through time per round, resident memory and bytes under the root, each as a change per 1,000 versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lora_grpo.adapters.retention import keep_archived, keep_best, keep_latest, keep_trainer_state
from lora_grpo.adapters.store import AdapterStore
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
    if arguments.versions < TENTHS:
        raise ConfigError(f"--versions={arguments.versions} must be at least {TENTHS}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, tempfile.TemporaryDirectory() as run:
        rounds = measure(Path(root) / "store", Path(run) / "run", arguments.versions, int(arguments.mib * 2**20))
    report(rounds)


def measure(root: Path, run: Path, versions: int, size_bytes: int) -> list[tuple[float, float, float]]:
    """Seconds, resident MiB and tmpfs MiB of each round."""
    draw = random.Random(0)
    body = bytearray(draw.randbytes(size_bytes))
    rounds = []
    with AdapterStore(root, run, retention=RETENTION) as store:
        for step in range(versions):
            body[:8] = step.to_bytes(8, "little")
            # The store keeps a state's bytes until they are on disk, so every state has its own.
            state = {"state.safetensors": [bytes(body)]}
            files = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [memoryview(body)]}
            started = time.perf_counter()
            version = store.publish(files, step=step)
            store.promote(version)
            store.record(version, reward=draw.random())
            store.archive_state(version, state, {"step": step})
            store.prune()
            seconds = time.perf_counter() - started
            # Outside the clock: so that memory shows what is kept, not how far a slow disk is behind.
            store.flush()
            rounds.append((seconds, resident_mib(), used_mib(root)))
    return rounds


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def used_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def report(rounds: Sequence[tuple[float, float, float]]) -> None:
    # The first rounds fill the places that retention then keeps full.
    settled = rounds[min(100, len(rounds) // TENTHS) :]
    print(f"{'versions':>16} {'round ms (median)':>18} {'RSS MiB':>9} {'tmpfs MiB':>10}")
    tenth = len(rounds) // TENTHS
    for start in range(0, tenth * TENTHS, tenth):
        part = rounds[start : start + tenth]
        seconds, resident, used = (statistics.median(column) for column in zip(*part, strict=True))
        print(f"{start + 1:>7} to {start + tenth:>5} {1e3 * seconds:>18.2f} {resident:>9.1f} {used:>10.1f}")
    numbers = range(len(settled))
    slopes = [1000 * statistics.linear_regression(numbers, column).slope for column in zip(*settled, strict=True)]
    print(
        json.dumps(
            {
                "versions": len(rounds),
                "round_ms_median": round(1e3 * statistics.median(seconds for seconds, _, _ in settled), 3),
                "round_ms_per_1000_versions": round(1e3 * slopes[0], 3),
                "rss_mib_per_1000_versions": round(slopes[1], 3),
                "tmpfs_mib_per_1000_versions": round(slopes[2], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
