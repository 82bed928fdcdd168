"""The durable half: archive, trainer states, what a reboot leaves, requests from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.adapters.asking.requests import pending, request
from lora_grpo.adapters.files.locks import holder
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep import archive
from lora_grpo.adapters.upkeep.retention import keep_archived, keep_best, keep_every, keep_latest, keep_trainer_state
from lora_grpo.errors import StoreError, StoreLocked, UnknownVersion
from tests.store_files import adapter, content, on_disk


def publish(store: AdapterStore, count: int) -> None:
    for _ in range(count):
        number = max((version.number for version in store.list()), default=0)
        store.promote(store.publish(adapter(number + 1), step=number))


def reboot(store: AdapterStore) -> None:
    """Stop without a clean close, and lose the tmpfs."""
    session = store._session
    assert session is not None
    session.lock.close()
    shutil.rmtree(store.root)


def test_a_pruned_version_comes_back_at_its_path(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path, retention=keep_latest(1)) as store:
        publish(store, 3)
        store.flush()
        assert store.prune() == [1, 2]
        first = store.get(1)
        assert not first.path.exists()
        assert store.where(1) == {"archive"}
        with pytest.raises(UnknownVersion, match=r"restore\(1\)"):
            store.promote(1)
        assert store.restore(1) == first
        assert on_disk(first.path) == content(adapter(1))
        assert store.where(1) == {"archive", "tmpfs"}
        store.promote(first)
        assert store.publish(adapter(4), step=3).parent == 1
        assert [version.number for version in store.list()] == [1, 2, 3, 4]


def test_the_archive_can_be_checked_without_this_library(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path) as store:
        publish(store, 1)
        store.archive_state(1, {"optimizer.safetensors": [b"exact", b"weights"]}, {"step": 3})
    for kind in ("versions", "states"):
        subprocess.run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=tmp_path / kind / "000001", check=True)
    assert (tmp_path / "versions/000001/version.json").read_bytes() == (
        shm_dir / "versions/000001/version.json"
    ).read_bytes()


def test_after_a_reboot_the_run_goes_on_and_says_what_was_lost(shm_dir: Path, tmp_path: Path) -> None:
    """Numbers given out before the reboot, archived or not, never come back."""
    root = shm_dir / "root"
    store = AdapterStore(root, tmp_path, retention=keep_latest(2) | keep_archived(keep_every(2)))
    publish(store, 5)
    store.flush()
    store.prune()
    store.publish(adapter(6), step=5)
    assert store.where(3) == frozenset()
    store.flush()
    shutil.rmtree(tmp_path / "versions/000005")
    reboot(store)
    with AdapterStore(archive=tmp_path) as again:
        assert again.root == root
        assert again.recovered.lost == (5,)
        assert again.recovered.head_moved == (5, 4)
        assert again.head is not None
        assert on_disk(again.head.path) == content(adapter(4))
        assert [version.number for version in again.list()] == [2, 4, 6]
        assert again.publish(adapter(7), step=6).number > 64
        with pytest.raises(UnknownVersion, match="lost with the tmpfs"):
            again.get(5)
    with AdapterStore(archive=tmp_path) as third:
        assert third.recovered.lost == ()


def test_numbers_survive_a_power_cut_that_takes_the_history_too(shm_dir: Path, tmp_path: Path) -> None:
    """Only what was fsynced is left: the reserved block is, the last lines of the journal may not be."""
    store = AdapterStore(shm_dir / "root", tmp_path)
    publish(store, 3)
    store.flush()
    for kind in ("versions", "states"):
        shutil.rmtree(tmp_path / kind)
    os.truncate(tmp_path / "journal.jsonl", 10)
    reboot(store)
    with AdapterStore(archive=tmp_path) as again:
        assert again.list() == []
        assert again.publish(adapter(9), step=0).number > 3


def test_a_clean_stop_leaves_no_gap_in_the_numbers_even_when_tmpfs_goes(tmp_path: Path) -> None:
    with AdapterStore(archive=tmp_path) as store:
        publish(store, 3)
        root = store.root
    assert not root.exists()
    with AdapterStore(archive=tmp_path) as again:
        assert again.root == root
        assert again.recovered.lost == ()
        assert again.head is not None
        assert on_disk(again.head.path) == content(adapter(3))
        assert again.publish(adapter(4), step=3).number == 4
        assert on_disk(again.restore(1).path) == content(adapter(1))


def test_a_killed_process_loses_no_version_that_tmpfs_still_has(shm_dir: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom lora_grpo.adapters.store import AdapterStore\nfrom tests.crash.moments import die_at\n"
        "from tests.store_files import adapter\n"
        "die_at('archive.copied')\n"
        "store = AdapterStore(sys.argv[1], sys.argv[2])\n"
        "store.promote(store.publish(adapter(1), step=0)); store.archive_state(1, {'w': [b'x']}, {}); store.flush()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(shm_dir), str(tmp_path)], check=False)
    assert done.returncode == -9
    with AdapterStore(shm_dir, tmp_path) as store:
        assert store.recovered.unarchived == (1,)
        assert store.recovered.lost == ()
        assert store.recovered.lost_states == (1,)
        assert store.recovered.swept == ("staging/versions-000001",)
        store.flush()
        assert store.where(1) == {"tmpfs", "archive"}
        assert store.load_state(1) is None
        store.verify(1)


def test_a_program_that_ends_without_closing_still_finishes_its_archive(shm_dir: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom lora_grpo.adapters.store import AdapterStore\nfrom tests.store_files import adapter\n"
        "store = AdapterStore(sys.argv[1], sys.argv[2])\n"
        "store.archive_state(store.publish(adapter(1), step=0), {'w': [bytes(1 << 20)]}, {})"
    )
    subprocess.run([sys.executable, "-c", program, str(shm_dir), str(tmp_path)], check=True)
    reader = AdapterStore(archive=tmp_path, readonly=True)
    assert reader.where(1) == {"tmpfs", "archive", "state"}
    reader.verify(1)


def test_trainer_states_follow_their_own_retention(shm_dir: Path, tmp_path: Path) -> None:
    retention = keep_trainer_state(keep_latest(1) | keep_best("reward"))
    with AdapterStore(shm_dir, tmp_path, retention=retention) as store:
        for number in range(1, 6):
            version = store.publish(adapter(number), step=number)
            store.record(version, reward=float(number == 2))
            store.archive_state(version, {"weights.safetensors": [bytes([number])]}, {"step": number})
        store.pin(3)
        store.flush()
        store.prune()
        assert [number for number in range(1, 6) if store.load_state(number)] == [2, 3, 5]
        state = store.load_state(5)
        assert state is not None
        assert sorted(state) == ["state.json", "weights.safetensors"]
        assert json.loads(state["state.json"].read_text()) == {"step": 5}
        assert state["weights.safetensors"].read_bytes() == b"\5"
        assert len(store.list()) == 5
        with pytest.raises(StoreError, match="written only once"):
            store.archive_state(5, {"weights.safetensors": [b"other"]}, {})


class Gate:
    """Holds the archive thread before it copies versions, or writes states, until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = getattr(owner, name)

        def held(*given: Any, **named: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return real(*given, **named)

        monkeypatch.setattr(owner, name, held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Gate]:
    held = {"versions": (archive, "_copy_checked"), "states": (archive.Archive, "keep_state")}
    return lambda kind: Gate(monkeypatch, *held[kind])


def test_steps_do_not_wait_for_the_archive(shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]) -> None:
    """And nothing that the archive has yet to get is pruned, nor removed while it is being read."""
    slow = gate("versions")
    with AdapterStore(shm_dir, tmp_path, retention=keep_latest(1)) as store:
        publish(store, 3)
        assert slow.reached.wait(60)
        assert store.prune() == []
        assert store.archive_backlog_bytes == sum(store.manifest(number).size_bytes for number in (1, 2, 3))
        slow.opened.set()
        store.flush()
        assert store.archive_backlog_bytes == 0
        assert store.prune() == [1, 2]


def test_what_a_slow_disk_was_writing_while_pruned_is_gone_once_closed(
    shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    slow = gate("states")
    store = AdapterStore(shm_dir, tmp_path, retention=keep_trainer_state(keep_latest(1)))
    publish(store, 3)
    store.flush()
    for number in (1, 2, 3):
        store.archive_state(number, {"w": [bytes(100)]}, {})
    assert slow.reached.wait(60)
    store.prune()
    slow.opened.set()
    store.close()
    with AdapterStore(shm_dir, tmp_path) as store:
        assert [number for number in (1, 2, 3) if store.load_state(number)] == [3]
        assert [store.where(number) for number in (1, 3)] == [{"tmpfs", "archive"}, {"tmpfs", "archive", "state"}]


def test_an_archived_copy_that_nobody_wants_is_gone_once_closed(
    shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    slow = gate("versions")
    store = AdapterStore(shm_dir, tmp_path, retention=keep_archived(keep_latest(1)))
    publish(store, 3)
    assert slow.reached.wait(60)
    assert store.prune() == []
    slow.opened.set()
    store.close()
    with AdapterStore(shm_dir, tmp_path, readonly=True) as store:
        assert [store.where(number) for number in (1, 2, 3)] == [{"tmpfs"}, {"tmpfs"}, {"tmpfs", "archive"}]


def test_what_is_durable_stays_until_what_replaces_it_is(
    shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    """A kill takes the queue with it: what is on the disk by then has to be worth going back to."""
    rules = keep_latest(8) | keep_archived(keep_latest(2)) | keep_trainer_state(keep_latest(2))
    store = AdapterStore(shm_dir, tmp_path, retention=rules)
    publish_with_states(store, 3)
    store.flush()
    store.prune()
    slow = gate("versions")
    publish_with_states(store, 4)
    assert slow.reached.wait(60)
    store.prune()
    assert store.states == [2, 3]
    assert [number for number in range(1, 8) if "archive" in store.where(number)] == [2, 3]
    slow.opened.set()
    store.close()
    with AdapterStore(shm_dir, tmp_path, readonly=True) as store:
        assert store.states == [6, 7]
        assert [number for number in range(1, 8) if "archive" in store.where(number)] == [6, 7]


def publish_with_states(store: AdapterStore, count: int) -> None:
    for _ in range(count):
        publish(store, 1)
        head = store.head
        assert head is not None
        store.archive_state(head, {"w": [bytes(100)]}, {"step": head.step})


def test_a_state_keeps_its_adapter_and_the_line_that_leads_to_it(shm_dir: Path, tmp_path: Path) -> None:
    rules = keep_latest(1) | keep_archived(keep_latest(1)) | keep_trainer_state(keep_every(2))
    with AdapterStore(shm_dir, tmp_path, retention=rules) as store:
        publish_with_states(store, 2)
        publish(store, 2)
        store.flush()
        store.prune()
        assert store.states == [2]
        assert store.where(2) == {"archive", "state"}
        assert store.where(3) == frozenset()
        assert on_disk(store.restore(2).path) == content(adapter(2))
        assert [store.parent_of(number) for number in (4, 3, 2, 1, 5)] == [3, 2, 1, None, None]
        store.promote(2)
        assert store.publish(adapter(5), step=2).parent == 2
    with AdapterStore(shm_dir, tmp_path, readonly=True) as store:
        assert [store.parent_of(number) for number in (5, 4, 3)] == [2, 3, 2]


def test_a_state_brings_its_adapter_to_an_archive_that_did_not_want_it(shm_dir: Path, tmp_path: Path) -> None:
    rules = keep_latest(2) | keep_archived(keep_latest(1)) | keep_trainer_state(keep_latest(1))
    with AdapterStore(shm_dir, tmp_path, retention=rules) as store:
        publish(store, 2)
        store.flush()
        store.prune()
        assert store.where(1) == {"tmpfs"}
        store.archive_state(1, {"w": [b"x"]}, {})
        store.flush()
        store.prune()
        assert store.where(1) == {"tmpfs", "archive", "state"}


def test_an_adapter_that_arrives_while_its_state_is_queued_is_not_written_twice(
    shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = gate("versions")
    with AdapterStore(shm_dir, tmp_path) as store:
        publish(store, 1)
        assert slow.reached.wait(60)
        session = store._session
        assert session is not None
        assert session.archive is not None
        real = session.archive.has

        def late(kind: str, number: int) -> bool:
            found = real(kind, number)
            slow.opened.set()
            session.writer.flush()
            return found

        monkeypatch.setattr(session.archive, "has", late)
        store.archive_state(1, {"w": [b"x"]}, {})
        slow.opened.set()
        store.flush()
        assert store.states == [1]


def test_a_full_queue_first_drops_the_states_that_retention_would(
    shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    slow = gate("states")
    retention = keep_trainer_state(keep_latest(1))
    with AdapterStore(shm_dir, tmp_path, retention=retention, backlog_limit_bytes=250) as store:
        publish(store, 4)
        store.flush()
        for number in (1, 2, 3):
            store.archive_state(number, {"w": [bytes(100)]}, {})
            if number == 1:
                assert slow.reached.wait(60)
        assert store.archive_backlog_bytes == 2 * 102, "state 2 made room for state 3, state 1 is being written"
        slow.opened.set()
        store.flush()
        assert [number for number in range(1, 5) if store.load_state(number)] == [1, 3]


def test_a_full_queue_that_nothing_may_leave_waits(shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]) -> None:
    slow = gate("states")
    with AdapterStore(shm_dir, tmp_path, backlog_limit_bytes=250) as store:
        publish(store, 3)
        store.flush()
        store.archive_state(1, {"w": [bytes(100)]}, {})
        store.archive_state(2, {"w": [bytes(100)]}, {})
        third = threading.Thread(target=store.archive_state, args=(3, {"w": [bytes(100)]}, {}))
        third.start()
        assert slow.reached.wait(60)
        assert store.archive_backlog_bytes <= 250
        slow.opened.set()
        third.join()
        store.flush()
        assert [number for number in (1, 2, 3) if store.load_state(number)] == [1, 2, 3]


def test_reading_a_state_waits_until_it_is_written(shm_dir: Path, tmp_path: Path, gate: Callable[[str], Gate]) -> None:
    slow = gate("states")
    with AdapterStore(shm_dir, tmp_path) as store:
        publish(store, 1)
        store.archive_state(1, {"w": [b"abc"]}, {})
        opener = threading.Timer(0, lambda: slow.reached.wait(60) and slow.opened.set())
        opener.start()
        state = store.load_state(1)
        assert state is not None
        assert state["w"].read_bytes() == b"abc"


def test_a_root_without_an_archive_can_be_given_one(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir) as store:
        publish(store, 2)
        store.record(2, reward=1.0)
        with pytest.raises(StoreError, match="open it with archive="):
            store.archive_state(2, {"w": [b"x"]}, {})
    with AdapterStore(shm_dir, tmp_path) as store:
        assert store.metrics(2) == {"reward": 1.0}
        assert store.head == store.get(2)
        assert store.publish(adapter(3), step=2).number == 3
        store.flush()
        assert store.where(1) == {"tmpfs", "archive"}
    with pytest.raises(StoreError, match="belongs to the run in"):
        AdapterStore(shm_dir)


def test_the_halves_of_two_runs_do_not_mix(shm_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with AdapterStore(shm_dir / name, tmp_path / name) as store:
            publish(store, 1)
    with pytest.raises(StoreError, match="versions of another run"):
        AdapterStore(shm_dir / "a", tmp_path / "new")
    with pytest.raises(StoreError, match=f"are in {shm_dir}/a"):
        AdapterStore(shm_dir / "new", tmp_path / "a")
    with pytest.raises(StoreError, match=f"are in {shm_dir}/a"):
        AdapterStore(shm_dir / "b", tmp_path / "a")


def test_a_run_directory_can_be_moved(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path / "before") as store:
        publish(store, 1)
    (tmp_path / "before").rename(tmp_path / "after")
    with AdapterStore(archive=tmp_path / "after") as store:
        assert store.head == store.get(1)
        store.publish(adapter(2), step=1)
    assert AdapterStore(shm_dir, readonly=True).archive == tmp_path / "after"


def test_one_writer(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path):
        who = holder(tmp_path)
        assert who is not None
        assert who.startswith(f"process {os.getpid()} on {socket.gethostname()}, since ")
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", who)
        for root, archive in ((shm_dir, tmp_path), (None, tmp_path), (shm_dir, tmp_path / "other")):
            with pytest.raises(StoreLocked, match=f" in {re.escape(who)}; stop that process"):
                AdapterStore(root, archive)
    assert holder(tmp_path) is None
    AdapterStore(shm_dir, tmp_path).close()


def test_requests_reach_the_holder_in_order_and_are_answered(shm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no process has"):
        request(tmp_path, "pin", number=1)
    with AdapterStore(shm_dir, tmp_path) as store:
        publish(store, 1)
        program = (
            "import sys\nfrom lora_grpo.adapters.asking.requests import request\n"
            "for number in range(12): request(sys.argv[1], 'rollback', to=number)"
        )
        others = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
        assert [other.wait() for other in others] == [0, 0]
        mine = request(tmp_path, "pin", number=1)
        waiting = pending(store.archive)
        assert len({asked.name for asked in waiting}) == 25
        assert sorted(asked.args["to"] for asked in waiting[:-1]) == sorted([*range(12)] * 2)
        assert waiting[-1] == mine
        assert mine.answered() is None
        mine.answer({"ok": True})
        assert len(pending(store.archive)) == 24
        assert mine.answered() == {"ok": True}
        assert mine.answered() is None
        (tmp_path / "requests/000001.json").write_text("{half")
        assert pending(store.archive)[0].verb == "unreadable"
