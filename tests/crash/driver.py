"""Kills processes that work on one store, again and again, and looks at what each kill left.

Every worker is a fork of this light process. It opens what the last kill left (nothing is ever closed cleanly in
between), checks it, and works until it dies: at a system call on files by its own hand, or at a random time by its
parent's.
Now and then the tmpfs half goes too, as in a reboot, the run directory is moved, or copied and the copy worked on, or
the run goes on for a while on a machine that does not see this tmpfs. The last line of stdout is a JSON summary.

    python -m tests.crash.driver FOLDER SEED KILLS_AT_CALLS RANDOM_KILLS
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_archived, keep_latest, keep_trainer_state
from lora_grpo.errors import UnknownVersion
from tests.crash.calls import Calls
from tests.store_files import adapter

DURABLE = {"versions": 6, "states": 2}
RETENTION = (
    keep_latest(3)
    | keep_archived(keep_latest(DURABLE["versions"]))
    | keep_trainer_state(keep_latest(DURABLE["states"]))
)
MAX_ROUNDS = 400
SLOW_DISK_S = 0.004
"""What a slow disk takes for each file: several steps a folder, so that retention meets a queue."""
MOST_CALLS = {"opening": 150, "working": 2000}
"""Up to which call a worker lives: within its opening, or for some rounds of work."""


def slow_down() -> None:
    """The disk is a slow one from now on, in this process."""
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(SLOW_DISK_S), fsync(descriptor))[1]


class Witness:
    """What every version number was seen to hold, over all processes; a number seen with two contents came back.

    `lost` are those that went with a tmpfs, since the disk did not have them yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: set[int] = set()

    def tmpfs_goes(self, run: Path) -> None:
        self.lost |= {n for n in self.digests() if not (run / "versions" / disk.folder_name(n)).is_dir()}

    def saw(self, number: int, digest: str) -> None:
        with open(self.path, "ab", buffering=0) as stream:
            stream.write(f"{number} {digest}\n".encode())

    def digests(self) -> dict[int, set[str]]:
        seen: dict[int, set[str]] = {}
        for line in self.path.read_text().splitlines():
            number, digest = line.split()
            seen.setdefault(int(number), set()).add(digest)
        return seen


def check(store: AdapterStore, witness: Witness) -> None:
    """What has to be true after any kill."""
    listed = store.list()
    for version in listed:
        store.verify(version.number)
        witness.saw(version.number, version.digest)
    head = store.head
    assert head is None or head in listed, f"HEAD is {head}"
    for number, digests in witness.digests().items():
        assert len(digests) == 1, f"number {number} was given out twice"
        fate = why_gone(store, number)
        assert fate is None or "removed by retention" in fate or number in witness.lost, fate


def check_durable(run: Path, most: dict[str, int]) -> None:
    """What is on the disk outlives what only waits for it; `most` is the largest number of folders ever seen there."""
    here = {kind: {path.name for path in (run / kind).glob("*")} for kind in DURABLE}
    for kind, kept in DURABLE.items():
        most[kind] = max(most[kind], len(here[kind]))
        assert len(here[kind]) >= min(kept, most[kind]), f"of {kept} durable {kind} to be kept, {here[kind]} are left"
    assert here["states"] <= here["versions"], f"states without their adapters: {here}"


def why_gone(store: AdapterStore, number: int) -> str | None:
    try:
        store.get(number)
    except UnknownVersion as gone:
        return str(gone)
    return None


def work(root: Path, run: Path, witness: Witness, inside: mmap.mmap, seed: int, rebooted: bool) -> None:
    """Open, check, then do everything that a training run does with a store, until killed."""
    draw = random.Random(seed)
    inside[0] = 1
    store = AdapterStore(root, run, retention=RETENTION)
    inside[1] = 1
    assert rebooted or not store.recovered.lost, f"lost without a reboot: {store.recovered}"
    assert not store.recovered.damaged, store.recovered
    assert store.head is None or "tmpfs" in store.where(store.head.number), "HEAD cannot be served"
    check(store, witness)
    inside[0] = 0
    for step in range(MAX_ROUNDS):
        operate(store, witness, inside, draw, seed * MAX_ROUNDS + step)


def operate(store: AdapterStore, witness: Witness, inside: mmap.mmap, draw: random.Random, content: int) -> None:
    inside[0] = 1
    version = store.publish(adapter(content, draw.randrange(100, 20_000)), step=content)
    witness.saw(version.number, version.digest)
    inside[0] = 0
    state = {"weights.safetensors": [bytes(draw.randrange(1, 30_000))]}
    operations: list[Callable[[], object]] = [
        lambda: store.archive_state(version, state, {"step": content}),
        lambda: store.promote(version),
        lambda: store.record(version, reward=draw.random()),
        store.prune,
        lambda: go_back(store, draw),
    ]
    if draw.random() < 0.3:
        operations.append(store.flush)
    for operation in operations:
        inside[0] = 1
        operation()
        inside[0] = 0


def go_back(store: AdapterStore, draw: random.Random) -> None:
    archived = [version for version in store.list() if "archive" in store.where(version.number)]
    if archived:
        store.promote(store.restore(draw.choice(archived)))


def killed(root: Path, run: Path, witness: Witness, seed: int, when: str | None, rebooted: bool) -> tuple[bool, bool]:
    """Fork a worker and wait for its death; whether it died inside an operation, and whether it got past opening."""
    draw = random.Random(seed)
    inside = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if child == 0:
        try:
            if draw.random() < 0.5:
                slow_down()
            if when is not None:
                Calls(draw.randint(1, MOST_CALLS[when]), after=draw.random() < 0.5).watch()
            work(root, run, witness, inside, seed, rebooted)
        finally:
            traceback.print_exc()
            os._exit(1)
    if when is None:
        time.sleep(draw.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"the worker for {when or 'a random kill'} (seed {seed}) ended with {status >> 8}")
    return when is not None or inside[0] == 1, inside[1] == 1


def elsewhere(root: Path, run: Path, witness: Witness, seed: int) -> None:
    """The run goes on where the root of here is out of sight, and is closed there."""
    hidden = root.with_name("hidden")
    if root.exists():
        root.rename(hidden)
    _in_child(lambda: _some_steps(AdapterStore(root, run, retention=RETENTION), witness, seed))
    if hidden.exists():
        shutil.rmtree(root)
        hidden.rename(root)


def copied(run: Path, witness: Witness, seed: int) -> None:
    """A copy of the run is worked on and killed; what was seen of the original is none of its business."""
    copy, own = run.with_name("copy"), Witness(witness.path.with_name("witness of the copy"))
    shutil.copytree(run, copy)
    own.path.write_text("")

    def work_on() -> None:
        store = AdapterStore(archive=copy, retention=RETENTION)
        assert store.recovered.copied_from == run.resolve(), store.recovered
        _some_steps(store, own, seed, close=False)

    _in_child(work_on)
    with AdapterStore(archive=copy, retention=RETENTION) as store:
        assert store.recovered.copied_from is None
        assert not store.recovered.lost
        check(store, own)
    shutil.rmtree(copy)


def _some_steps(store: AdapterStore, witness: Witness, seed: int, *, close: bool = True) -> None:
    draw, inside = random.Random(seed), mmap.mmap(-1, mmap.PAGESIZE)
    for step in range(3):
        operate(store, witness, inside, draw, -seed * MAX_ROUNDS - step)
    if close:
        store.close()


def _in_child(work_on: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work_on()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    if status := os.waitpid(child, 0)[1]:
        raise SystemExit(f"a worker that nobody killed ended with {status}")


def main(folder: Path, seed: int, kills_at_calls: int, random_kills: int) -> dict[str, object]:
    root, run = folder / "root", folder / "run"
    witness = Witness(folder / "witness")
    witness.path.touch()
    plan: list[str | None] = [*["opening", "working"] * (kills_at_calls // 2), *[None] * random_kills]
    draw = random.Random(seed)
    draw.shuffle(plan)
    inside, rebooted = 0, False
    events = dict.fromkeys(("reboot", "elsewhere", "move", "copy"), 0)
    most = dict.fromkeys(DURABLE, 0)
    for index, when in enumerate(plan):
        event = draw.choices([*events, None], [1, 1, 1, 1, 16])[0]
        if when == "opening" and index % 8 == 0:
            event = "elsewhere"
        if not (run / "store.json").exists() or not (root / "store.json").exists():
            event = None
        if event is not None:
            events[event] += 1
        if event in ("reboot", "elsewhere"):
            witness.tmpfs_goes(run)
        if event == "reboot":
            shutil.rmtree(root)
        elif event == "elsewhere":
            elsewhere(root, run, witness, seed * len(plan) + index)
        elif event == "move":
            run = run.rename(folder / f"run-{index}")
        elif event == "copy":
            copied(run, witness, seed * len(plan) + index)
        rebooted = rebooted or event in ("reboot", "elsewhere")
        died_inside, opened = killed(root, run, witness, seed * len(plan) + index, when, rebooted)
        inside += died_inside
        check_durable(run, most)
        # What went with the tmpfs is only told of once an opening has settled it.
        settled = opened or not rebooted
        if settled and (run / "store.json").exists() and (root / "store.json").exists():
            check(AdapterStore(archive=run, readonly=True), witness)
        rebooted = rebooted and not opened
    return {
        "kills": len(plan),
        "inside": inside,
        "random": random_kills,
        "events": events,
        "versions": len(witness.digests()),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
