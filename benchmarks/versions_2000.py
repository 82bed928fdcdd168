"""Publish and prune thousands of versions; time per publish, memory and tmpfs use must not grow with their number.

    python benchmarks/versions_2000.py [--versions 2000] [--mib 1.0]

An adapter is of so many MiB. Each round is a training step's worth of store work: publish, promote, record, archive a
trainer state, prune. Prints the run in tenths, and as the last line of stdout one JSON object: of publishing and of
whole rounds, lines through the tenths' medians (a busy disk makes outliers) as changes per 1,000 versions.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_archived, keep_best, keep_latest, keep_trainer_state
from lora_grpo.bench.endurance import TENTHS, is_looked_at, slopes, taken_now, tenths
from lora_grpo.bench.provenance import asked
from lora_grpo.bench.schema import EnduranceRow
from lora_grpo.errors import ConfigError

RETENTION = (
    keep_latest(8) | keep_archived(keep_latest(16) | keep_best("reward", 4)) | keep_trainer_state(keep_latest(2))
)
FILL = 100
"""Rounds at the start that fill the places which retention then keeps full; they are left out."""


def main() -> None:
    arguments = asked(__doc__, versions=2000, mib=1.0)
    if arguments.versions < FILL + TENTHS:
        raise ConfigError(f"--versions={arguments.versions} must be at least {FILL + TENTHS}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, tempfile.TemporaryDirectory() as run:
        tables = measure(Path(root) / "store", Path(run) / "run", arguments.versions, int(arguments.mib * 2**20))
    print(f"{'versions':>16} {'publish ms':>11} {'round ms':>9} {'PSS MiB':>9} {'tmpfs MiB':>10}   (medians)")
    for publish, whole in zip(*tables.values(), strict=True):
        span = f"{FILL + publish.first:>7} to {FILL + publish.last:>5}"
        sizes = f"{whole.memory_bytes / 2**20:>9.1f} {whole.tmpfs_bytes / 2**20:>10.1f}"
        print(f"{span} {1e3 * publish.median_s:>11.2f} {1e3 * whole.median_s:>9.2f} {sizes}")
    lines = {name: slopes(table)[0].model_dump(exclude_none=True) for name, table in tables.items()}
    print(json.dumps({"versions": arguments.versions, **lines}))


def measure(root: Path, run: Path, versions: int, size_bytes: int) -> dict[str, list[EnduranceRow]]:
    """Tenths of publish and promote, and of whole rounds."""
    draw = random.Random(0)
    body = bytearray(draw.randbytes(size_bytes))
    publish_s, whole_s, levels = [0.0] * versions, [0.0] * versions, []
    with AdapterStore(root, run, retention=RETENTION) as store:
        for step in range(versions):
            body[:8] = step.to_bytes(8, "little")
            # The store keeps a state's bytes until they are on disk, so every state has its own.
            state = {"state.safetensors": [bytes(body)]}
            files = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [memoryview(body)]}
            started = time.perf_counter()
            version = store.publish(files, step=step)
            store.promote(version)
            publish_s[step] = time.perf_counter() - started
            store.record(version, reward=draw.random())
            store.archive_state(version, state, {"step": step})
            store.prune()
            whole_s[step] = time.perf_counter() - started
            # Outside the clock: so that memory shows what is kept, not how far a slow disk is behind.
            store.flush()
            if step >= FILL and is_looked_at(step - FILL, versions):
                levels.append({"sync": step - FILL, **taken_now("cpu", root)})
    return {
        name: [EnduranceRow(strategy=name, shape="store", rank=0, **one) for one in tenths(seconds[FILL:], levels)]
        for name, seconds in (("publish", publish_s), ("round", whole_s))
    }


if __name__ == "__main__":
    main()
