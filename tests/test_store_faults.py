"""What the world can do to a store: full disks, damaged files, deleted folders, clocks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_grpo.adapters.files import disk, places
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep import archive
from lora_grpo.adapters.upkeep.retention import keep_latest
from lora_grpo.adapters.version import PEFT_FILES
from lora_grpo.errors import NoRoom, StoreCorrupt, StoreError, UnknownVersion
from tests.store_files import adapter, content, on_disk

MIB = 1 << 20
WEIGHTS = "adapter_model.safetensors"


def check_sound(store: AdapterStore, numbers: list[int]) -> None:
    assert [version.number for version in store.list()] == numbers
    for number in numbers:
        store.verify(number)


def mounted(folder: Path, size: str) -> bool:
    """Mount a small tmpfs; only root may."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    return done.returncode == 0


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    if not mounted(folder, "1m"):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_tmpfs_is_found_before_writing(small_tmpfs: Path) -> None:
    root = small_tmpfs / "root"
    with AdapterStore(root) as store:
        for step in range(3):
            store.promote(store.publish(adapter(step, 300_000), step=step))
        before = sorted(root.rglob("*"))
        with pytest.raises(
            NoRoom,
            match=r"needs 0\.3\d MiB .* has room for 0\.\d\d MiB of 1 MiB, versions taking 0\.86 MiB: .*free what else "
            ".* a larger file system$",
        ):
            store.publish(adapter(3, 300_000), step=3)
        assert sorted(root.rglob("*")) == before
        check_sound(store, [1, 2, 3])
        assert store.publish(adapter(4, 1000), step=3).number == 4


def test_a_tmpfs_that_fills_while_writing_loses_nothing(small_tmpfs: Path) -> None:
    """Somebody else's file takes the last page after the check; HEAD can still be moved."""
    root = small_tmpfs / "root"
    with AdapterStore(root) as store:
        for step in range(2):
            store.promote(store.publish(adapter(step), step=step))
        filler = small_tmpfs / "filler"

        def full(*given: Any, **named: Any) -> None:
            disk.write_file = write_file
            filler.write_bytes(bytes(shutil.disk_usage(small_tmpfs).free - 8192))
            write_file(*given, **named)

        write_file, disk.write_file = disk.write_file, full
        try:
            with pytest.raises(
                NoRoom, match=r"No space left on device \(.*/adapter_model.*was published before is intact$"
            ):
                store.publish(adapter(3, 100_000), step=2)
        finally:
            disk.write_file = write_file
        check_sound(store, [1, 2])
        assert list((root / "staging").iterdir()) == []
        with open(filler, "ab", buffering=0) as stream:
            stream.write(bytes(shutil.disk_usage(small_tmpfs).free))
        assert shutil.disk_usage(small_tmpfs).free == 0
        store.promote(1)
        assert store.head == store.get(1)
        filler.unlink()
        assert store.publish(adapter(4), step=2).number == 4


def test_too_little_room_prunes_what_retention_gives_up_first(small_tmpfs: Path, tmp_path: Path) -> None:
    with AdapterStore(small_tmpfs / "root", tmp_path / "run", retention=keep_latest(2)) as store:
        for step in range(8):
            store.promote(store.publish(adapter(step, 250_000), step=step))
        assert len(store.list()) == 8
        on_tmpfs = [version.number for version in store.list() if "tmpfs" in store.where(version.number)]
        assert on_tmpfs[-2:] == [7, 8]
        assert len(on_tmpfs) <= 3


def test_docker_s_shm_is_named_where_it_is_what_is_full(
    shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full archive, or a store in a folder on a disk, gets no room from it."""

    def full(descriptor: int, content: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for folder, says in ((shm_dir, r"a larger tmpfs \(.*--shm-size=8g\)$"), (tmp_path, "a larger file system$")):
        with monkeypatch.context() as patched:
            patched.setattr(places.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000, total=20_000))
            with pytest.raises(NoRoom, match=says):
                places.require_room(folder, {"probe": 50_000}, "the probe")
            with AdapterStore(folder / "store") as store, pytest.raises(NoRoom, match=says):
                store.publish(adapter(1), step=0)
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(NoRoom) as raised, disk.reported("writing"):
                disk.write_file(folder / "file", [b"some"], sync=False)
        assert ("--shm-size" in str(raised.value)) == (folder == shm_dir)
        assert str(folder / "file") in str(raised.value)


def test_a_budget_is_kept(shm_dir: Path) -> None:
    with AdapterStore(shm_dir, budget_bytes=10_000) as store:
        for step in range(3):
            store.publish(adapter(step), step=step)
        with pytest.raises(NoRoom, match=r"budget_bytes=10000 has room for 0\.00 MiB.*--shm-size"):
            store.publish(adapter(3), step=3)
        check_sound(store, [1, 2, 3])
    with AdapterStore(shm_dir, budget_bytes=10_000, retention=keep_latest(1)) as store:
        store.promote(3)
        assert store.publish(adapter(3), step=3).number == 4
        check_sound(store, [3, 4])


def test_a_file_size_limit_while_writing_is_a_store_error(shm_dir: Path) -> None:
    """RLIMIT_FSIZE makes write fail half-way, as a quota does."""
    program = (
        "import resource, signal, sys\nfrom lora_grpo.adapters.store import AdapterStore\n"
        "from lora_grpo.errors import StoreError\nfrom tests.store_files import adapter\n"
        "store = AdapterStore(sys.argv[1]); store.publish(adapter(1), step=0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))\n"
        "try:\n    store.publish(adapter(2, 100_000), step=1)\n"
        "except StoreError as error:\n    print(error)\n"
        "store.verify(1); print([v.number for v in store.list()], store.publish(adapter(3), step=1))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(shm_dir)], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("publishing a version failed: File too large")
    assert second == "[1] v3"


def test_a_file_size_limit_while_archiving_leaves_no_shorter_copy(shm_dir: Path, tmp_path: Path) -> None:
    """The kernel writes up to the limit and reports how much that was; only what follows fails."""
    program = (
        "import resource, signal, sys\nfrom lora_grpo.adapters.store import AdapterStore\n"
        "from lora_grpo.errors import StoreError\nfrom tests.store_files import adapter\n"
        "store = AdapterStore(sys.argv[1]); store.publish(adapter(1, 100_000), step=0); store.close()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))\n"
        "store = AdapterStore(sys.argv[1], sys.argv[2])\n"
        "try:\n    store.flush()\nexcept StoreError as error:\n    print(error)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY}))\n"
        "store.flush(); store.verify(1); print(sorted(store.where(1)))"
    )
    command = [sys.executable, "-c", program, str(shm_dir), str(tmp_path)]
    first, second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert first.startswith("archiving version 1 failed: File too large")
    assert second == "['archive', 'tmpfs']"


@pytest.mark.parametrize("file", [*PEFT_FILES, "version.json"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "deleted", "emptied"])
@pytest.mark.parametrize("half", ["tmpfs", "archive"])
def test_damage_is_named_and_the_other_copy_survives(
    shm_dir: Path, tmp_path: Path, file: str, damage: str, half: str
) -> None:
    with AdapterStore(shm_dir, tmp_path) as store:
        for step in range(2):
            store.promote(store.publish(adapter(step), step=step))
        store.flush()
        path = (shm_dir if half == "tmpfs" else tmp_path) / "versions/000001" / file
        spoil(path, damage)
        with pytest.raises(StoreCorrupt, match=r"versions/000001"):
            store.verify(1)
        store.verify(2)
        assert [version.number for version in store.list()] == [1, 2]
        if half == "tmpfs":
            assert on_disk(store.restore(1).path) == content(adapter(0))
            store.verify(1)
        else:
            assert on_disk(store.get(1).path) == content(adapter(0))


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "truncated":
            os.truncate(path, len(content) - 1)
        case "emptied":
            os.truncate(path, 0)
        case "garbled":
            path.write_bytes(content)
        case "deleted":
            path.unlink()


def test_a_damaged_archived_copy_is_not_restored(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path, retention=keep_latest(1)) as store:
        for step in range(2):
            store.promote(store.publish(adapter(step), step=step))
        store.flush()
        assert store.prune() == [1]
        spoil(tmp_path / "versions/000001" / WEIGHTS, "garbled")
        with pytest.raises(StoreCorrupt, match="has digest"):
            store.restore(1)
        assert store.where(1) == {"archive"}
        assert list((shm_dir / "staging").iterdir()) == []


def test_a_damaged_trainer_state_is_not_handed_out(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path) as store:
        store.archive_state(store.publish(adapter(1), step=0), {"w": [b"weights"]}, {})
        store.flush()
        spoil(tmp_path / "states/000001/w", "garbled")
        with pytest.raises(StoreCorrupt, match=r"states/000001/w differs"):
            store.load_state(1)
        with pytest.raises(StoreCorrupt, match=r"states/000001/w differs"):
            store.verify(1)


@pytest.mark.parametrize("archived", [True, False])
def test_damage_on_tmpfs_before_archiving_is_reported_once_and_the_run_goes_on(
    shm_dir: Path, tmp_path: Path, archived: bool
) -> None:
    """A version that no retry can archive must not make every later call, or every later start, fail."""
    with AdapterStore(shm_dir) as store:
        for step in range(3):
            store.promote(store.publish(adapter(step), step=step))
        spoil(shm_dir / "versions/000002" / WEIGHTS, "truncated")
        if not archived:
            spoil(shm_dir / "versions/000003" / WEIGHTS, "garbled")
    with AdapterStore(shm_dir, tmp_path) as store:
        assert store.recovered.damaged == ((2,) if archived else (2, 3))
        assert store.recovered.head_moved == (None if archived else (3, 1))
        store.promote(store.publish(adapter(3), step=3))
        store.flush()
        assert store.where(2) == {"tmpfs"}
        victim = store.publish(adapter(4), step=4)
        store.flush()
        shutil.rmtree(tmp_path / "versions" / victim.path.name)
        spoil(victim.path / WEIGHTS, "garbled")
        session = store._session
        assert session is not None
        session.archive_version(store._catalog.manifest(victim.number))
        with pytest.raises(StoreCorrupt, match=victim.path.name):
            store.flush()
        store.flush()
        store.publish(adapter(5), step=5)


def test_a_version_deleted_behind_the_stores_back(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir / "bare") as store:
        for step in range(3):
            store.promote(store.publish(adapter(step), step=step))
        shutil.rmtree(store.get(3).path)
        for look in (store.get, store.restore, store.verify, store.acquire, store.promote):
            with pytest.raises(UnknownVersion, match="000003 is gone"):
                look(3)
        with pytest.raises(UnknownVersion, match="deleted by another program"):
            _ = store.head
        check_sound(store, [1, 2])
        store.promote(store.publish(adapter(4), step=3, parent=2))
        shutil.rmtree(store.get(4).path)
    with AdapterStore(shm_dir / "bare") as store:
        assert store.recovered.lost == (3, 4)
        assert store.recovered.head_moved == (4, 2)
        assert store.head == store.get(2)
        assert store.publish(adapter(5), step=3).number == 5
    with AdapterStore(shm_dir / "root", tmp_path) as store:
        store.promote(store.publish(adapter(0), step=0))
        store.flush()
        shutil.rmtree(store.get(1).path)
        assert on_disk(store.restore(1).path) == content(adapter(0))


def test_an_archive_that_cannot_be_written_says_so_and_catches_up(shm_dir: Path, tmp_path: Path) -> None:
    """Tests may run as root, who may write anywhere; a file where a folder should be stops root too."""
    with AdapterStore(shm_dir, tmp_path, retention=keep_latest(1)) as store:
        store.promote(store.publish(adapter(0), step=0))
        store.flush()
        shutil.rmtree(tmp_path / "staging")
        (tmp_path / "staging").write_text("in the way")
        store.promote(store.publish(adapter(1), step=1))
        with pytest.raises(StoreError, match=r"archiving version 2 failed: Not a directory .*staging"):
            store.flush()
        with pytest.raises(StoreError, match="archiving version 2 failed"):
            store.flush()
        check_sound(store, [1, 2])
        (tmp_path / "staging").unlink()
        (tmp_path / "staging").mkdir()
        with suppress(StoreError):
            store.flush()
        store.flush()
        assert store.where(2) == {"tmpfs", "archive"}
        check_sound(store, [1, 2])


def test_a_disk_that_fails_while_a_version_is_written_does_not_cost_that_version(
    shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is published by then: the failure, which is an earlier one's, waits for the next call."""
    with AdapterStore(shm_dir, tmp_path, retention=keep_latest(1)) as store:
        store.publish(adapter(0), step=0)
        store.flush()
        session = store._session
        assert session is not None
        writing, failed = threading.Event(), threading.Event()

        copy, append = archive._copy_checked, session.journal.append

        def fail_once(*given: Any, **named: Any) -> dict[str, str]:
            if not failed.is_set():
                assert writing.wait(60)
                failed.set()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return copy(*given, **named)

        def append_late(event: str, number: int, **fields: Any) -> None:
            if (event, number) == ("publish", 3):
                writing.set()
                while session.writer._failure is None:
                    time.sleep(0.001)
            append(event, number, **fields)

        monkeypatch.setattr(archive, "_copy_checked", fail_once)
        monkeypatch.setattr(session.journal, "append", append_late)
        store.publish(adapter(1), step=1)
        third = store.publish(adapter(2), step=2)
        with pytest.raises(StoreError, match="archiving version 2 failed"):
            store.promote(third)
        store.promote(third)
        store.flush()
        assert [store.where(number) for number in (2, 3)] == [{"tmpfs", "archive"}] * 2
        assert store.prune() == [1, 2]


def test_a_bug_in_the_archive_thread_is_raised_and_its_job_done_all_the_same(
    shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdapterStore(shm_dir, tmp_path) as store:
        with monkeypatch.context() as broken:
            broken.setattr(archive, "_sums_text", lambda _: 1 / 0)
            store.publish(adapter(0), step=0)
            with pytest.raises(StoreError, match=r"the archive thread failed: ZeroDivisionError: division by zero"):
                store.flush()
        with suppress(StoreError):
            store.flush()
        store.flush()
        assert store.where(1) == {"tmpfs", "archive"}


def test_a_full_queue_before_a_broken_disk_refuses_the_next_state(
    shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes in flight stay bounded, and the refused state can be handed over again."""
    second = threading.Event()

    def fail(_: object) -> bytes:
        assert second.wait(60)
        time.sleep(0.05)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with AdapterStore(shm_dir, tmp_path, backlog_limit_bytes=150) as store:
        for step in range(2):
            store.publish(adapter(step), step=step)
        store.flush()
        with monkeypatch.context() as broken:
            broken.setattr(archive, "_sums_text", fail)
            store.archive_state(1, {"w": [bytes(100)]}, {})
            second.set()
            with pytest.raises(StoreError, match="trainer state of version 1 failed"):
                store.archive_state(2, {"w": [bytes(100)]}, {})
            assert store.archive_backlog_bytes == 102
        with suppress(StoreError):
            store.flush()
        store.archive_state(2, {"w": [bytes(100)]}, {})
        store.flush()
        assert store.states == [1, 2]


def test_closing_over_a_broken_archive_raises_and_unlocks(shm_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore(shm_dir, tmp_path)
    shutil.rmtree(tmp_path / "staging")
    store.publish(adapter(0), step=0)
    with pytest.raises(StoreError, match="archiving version 1 failed"):
        store.close()
    with AdapterStore(shm_dir, tmp_path) as again:
        assert again.recovered.unarchived == (1,)
        assert again.publish(adapter(1), step=1).number == 2


def test_a_run_directory_that_is_a_file(shm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(StoreError, match="opening the run directory"):
        AdapterStore(shm_dir, tmp_path / "run")


def test_a_clock_that_goes_backwards_changes_no_order(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", iter([3e9, 2e9, 1e9, 5e8]).__next__)
    with AdapterStore(shm_dir, retention=keep_latest(2)) as store:
        for step in range(3):
            store.promote(store.publish(adapter(step), step=step))
        assert [version.number for version in store.list()] == [1, 2, 3]
        assert store.prune() == [1]
        assert store.head == store.get(3)


def test_a_torn_or_garbled_journal_costs_no_version(shm_dir: Path) -> None:
    with AdapterStore(shm_dir) as store:
        for step in range(3):
            store.promote(store.publish(adapter(step), step=step))
        store.record(1, reward=1.0)
    journal = shm_dir / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[0] = b"\xff\xfe garbage\n"
    journal.write_bytes(b"".join(lines) + b'{"event":"record","number":2,"metr')
    reader = AdapterStore(shm_dir, readonly=True)
    check_sound(reader, [1, 2, 3])
    assert reader.damaged_lines == (1,)
    with AdapterStore(shm_dir) as store:
        assert store.recovered.damaged_lines == (1,)
        check_sound(store, [1, 2, 3])
        assert store.metrics(1) == {"reward": 1.0}
        store.record(2, reward=2.0)
        assert store.head == store.get(3)
        assert reader.metrics(2) == {"reward": 2.0}
    journal.unlink()
    with AdapterStore(shm_dir) as store:
        check_sound(store, [1, 2, 3])
        assert store.publish(adapter(4), step=4).number == 4


@pytest.mark.parametrize("half", ["root", "run"])
def test_a_garbled_number_file_stops_the_writer_not_the_reader(shm_dir: Path, tmp_path: Path, half: str) -> None:
    with AdapterStore(shm_dir, tmp_path) as store:
        store.promote(store.publish(adapter(1), step=0))
    path = (shm_dir if half == "root" else tmp_path) / "NUMBERS"
    path.write_text("many\n")
    with pytest.raises(StoreCorrupt, match=r"NUMBERS should hold a number .* at least as large"):
        AdapterStore(shm_dir, tmp_path)
    check_sound(AdapterStore(shm_dir, readonly=True), [1])
    path.write_text("17\n")
    with AdapterStore(shm_dir, tmp_path) as store:
        assert store.publish(adapter(2), step=1).number >= 2


@pytest.mark.parametrize("half", ["root", "run"])
def test_a_garbled_identity_is_named(shm_dir: Path, tmp_path: Path, half: str) -> None:
    AdapterStore(shm_dir, tmp_path).close()
    path = (shm_dir if half == "root" else tmp_path) / "store.json"
    path.write_text('{"format": 1')
    with pytest.raises(StoreCorrupt, match=r"store\.json is damaged"):
        AdapterStore(shm_dir, tmp_path)
    path.write_text('{"format": 99, "run_id": "x", "other": null, "own_root": false}')
    with pytest.raises(StoreError, match="format 99"):
        AdapterStore(shm_dir, tmp_path)


@pytest.mark.parametrize("spoiled", ["file", "elsewhere", "missing"])
def test_a_spoiled_head_is_mended_from_the_history(shm_dir: Path, spoiled: str) -> None:
    with AdapterStore(shm_dir) as store:
        for step in range(2):
            store.promote(store.publish(adapter(step), step=step))
    (shm_dir / "HEAD").unlink()
    if spoiled == "file":
        (shm_dir / "HEAD").write_text("2")
    elif spoiled == "elsewhere":
        (shm_dir / "HEAD").symlink_to("/nowhere")
    with AdapterStore(shm_dir) as store:
        assert store.head == store.get(2)
        assert store.recovered.head_moved is None
