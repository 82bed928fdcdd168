"""Stores that other programs, other users and bad disks have had their hands on: named, worked around, no traceback."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_grpo import report
from lora_grpo.adapters.asking.requests import pending, request
from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.locks import holder
from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog, roll_back_stopped
from lora_grpo.engines.server.replica import Names
from lora_grpo.errors import LoraGrpoError, StoreCorrupt, StoreError, UnknownVersion
from tests.store_files import adapter, content, on_disk
from tests.test_cli_versions import lora_grpo

DEEP = b"[" * 100_000


@pytest.fixture
def run(shm_dir: Path, tmp_path: Path) -> Path:
    """Three versions on tmpfs and in the archive, with metrics."""
    with AdapterStore(shm_dir, tmp_path) as store:
        for step in (1, 2, 3):
            store.promote(store.publish(adapter(step), step=step))
            store.record(step, reward=step / 10)
    return tmp_path


def sound(store: AdapterStore, numbers: list[int]) -> None:
    assert [version.number for version in store.list()] == numbers
    for number in numbers:
        store.verify(number)
        assert on_disk(store.readable(number)).items() >= content(adapter(number)).items()


@pytest.mark.parametrize("half", ["tmpfs", "archive", "both"])
def test_a_folder_without_a_manifest_is_told_of_not_a_traceback(run: Path, shm_dir: Path, half: str) -> None:
    for folder in [shm_dir] * (half != "archive") + [run] * (half != "tmpfs"):
        shutil.copytree(folder / "versions" / "000002", folder / "versions" / "000005")
        (folder / "versions" / "000005" / "version.json").unlink()
    listed = lora_grpo("versions", run, "--json")
    assert [row["version"] for row in json.loads(listed.stdout)] == [1, 2, 3]
    for arguments in (("show", run, 5), ("export", run, 5, run / "export")):
        refused = lora_grpo(*arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "version.json is gone" in refused.stderr
    verified = lora_grpo("verify", run, "--json")
    assert verified.returncode == 1
    found = {row["version"]: row for row in json.loads(verified.stdout)["versions"]}
    assert [number for number in found if not found[number]["ok"]] == [5]
    assert "version.json is gone" in found[5]["found"]
    with AdapterStore(archive=run) as store:
        assert store.recovered.damaged == (5,)
        sound(store, [1, 2, 3])
        with pytest.raises(StoreCorrupt, match=r"version\.json is gone"):
            store.get(5)
        assert store.publish(adapter(6), step=6).number > 5


def test_a_version_that_goes_while_it_is_looked_at_is_unknown(
    run: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live run prunes between the look into the folder and the reading of the manifest."""
    (run / "journal.jsonl").unlink()
    reader = AdapterStore(archive=run, readonly=True)
    real = disk.read_small

    def raced(path: Path) -> bytes | None:
        if path.parent.name == "000002":
            for folder in (shm_dir, run):
                shutil.rmtree(folder / "versions" / "000002", ignore_errors=True)
        return real(path)

    monkeypatch.setattr(disk, "read_small", raced)
    assert [version.number for version in reader.list()] == [1, 3]
    with pytest.raises(UnknownVersion, match="there is no version 2"):
        reader.get(2)


def test_versions_lists_what_is_left_when_one_goes_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = importlib.import_module("lora_grpo.cli.versions")
    real, rows = report.describe, []

    def raced(*arguments: Any) -> dict[str, Any]:
        if arguments[1].number == 2:
            raise UnknownVersion("version 2 was removed by retention")
        return real(*arguments)

    monkeypatch.setattr(report, "describe", raced)
    monkeypatch.setattr(versions, "tell", lambda known, *_: rows.extend(known))
    versions.versions(run, as_json=True)
    assert [row["version"] for row in rows] == [1, 3]


@pytest.mark.parametrize("name", ["000034", "000004", "34", "0000007", "²", "x" * 200, "000000"])
@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link"])
def test_a_stray_entry_locks_nobody_out(run: Path, shm_dir: Path, name: str, kind: str) -> None:
    for folder in (shm_dir / "versions", run / "versions", run / "states"):
        path = folder / name
        {"file": path.touch, "folder": path.mkdir, "pipe": lambda p=path: os.mkfifo(p)}.get(
            kind, lambda p=path: p.symlink_to("/nowhere")
        )()
    sound(AdapterStore(archive=run, readonly=True), [1, 2, 3])
    with AdapterStore(archive=run) as store:
        sound(store, [1, 2, 3])
        version = store.publish(adapter(9), step=9)
        assert version.number not in (1, 2, 3)
        store.promote(version)
        store.archive_state(version, {"state": [b"s"]}, {})
        store.flush()
        store.prune()
    with AdapterStore(archive=run) as store:
        assert store.head == store.get(version.number)


@pytest.mark.parametrize("place", ["staging", "trash"])
@pytest.mark.parametrize("kind", ["file", "pipe", "link"])
def test_what_a_dead_process_left_may_be_anything(run: Path, shm_dir: Path, place: str, kind: str) -> None:
    for folder in (shm_dir, run):
        path = folder / place / "versions-000004"
        {"file": path.touch, "pipe": lambda p=path: os.mkfifo(p)}.get(kind, lambda p=path: p.symlink_to(run))()
    with AdapterStore(archive=run) as store:
        sound(store, [1, 2, 3])
        assert store.publish(adapter(4), step=4).number == 4


def test_every_flipped_digit_of_the_history_costs_a_line_and_no_version(run: Path, shm_dir: Path) -> None:
    """A version whose line is wrong is what its own manifest says; the line is named."""
    journal = run / "journal.jsonl"
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    number = next(index for index, line in enumerate(lines, 1) if b'"publish"' in line and b'"number":2' in line)
    start = sum(map(len, lines[: number - 1]))
    for place in range(start, start + len(lines[number - 1]) - 1, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        journal.write_bytes(damaged)
        with AdapterStore(archive=run, readonly=True) as reader:
            sound(reader, [1, 2, 3])
            key = range(lines[number - 1].index(b',"crc":"') + start, start + len(lines[number - 1]) - 1)
            assert reader.damaged_lines in ((number,), (number, number + 1)) or place in key
    damaged = bytearray(whole)
    digit = start + lines[number - 1].index(b'"digest":"') + 12
    damaged[digit] = ord("0") if damaged[digit] != ord("0") else ord("1")
    journal.write_bytes(damaged)
    with AdapterStore(archive=run) as store:
        assert store.recovered.damaged_lines == (number,)
        assert not store.recovered.damaged
        sound(store, [1, 2, 3])
        assert store.metrics(3) == {"reward": 0.3}


def test_a_line_without_a_checksum_is_damaged(run: Path) -> None:
    with open(run / "journal.jsonl", "ab") as stream:
        stream.write(b'{"event":"record","number":2,"metrics":{"reward":99}}\n')
    with AdapterStore(archive=run) as store:
        assert len(store.recovered.damaged_lines) == 1
        assert store.metrics(2) == {"reward": 0.2}


SPOILED = {
    "store.json": StoreCorrupt,
    "versions/000002/version.json": None,
    "journal.jsonl": None,
    "LOCK": None,
    "NUMBERS": StoreCorrupt,
}
CONTENTS = {
    "deep": DEEP,
    "list": b"[]\n",
    "number": b"1\n",
    "null": b"null\n",
    "text": b"\xff\xfe\x00",
    "huge": b"9" * 5000 + b"\n",
    "fields": b'{"format": 1, "run_id": 3, "other": [], "own_root": 1, "number": "x", "pid": [], "event": {}}\n',
    "zero": b'{"format": 1, "run_id": "x", "other": "a\\u0000b", "own_root": false, "number": 1e999, "event": "pin"}\n',
}


@contextmanager
def told(name: str) -> Iterator[None]:
    """What is raised, if anything is, is an error of ours that names the file."""
    refused = ""
    try:
        yield
    except StoreError as error:
        refused = str(error)
    assert not refused or name in refused


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("file", SPOILED)
@pytest.mark.parametrize("half", ["root", "run"])
def test_spoiled_contents_are_named(run: Path, shm_dir: Path, file: str, what: str, half: str) -> None:
    path = (shm_dir if half == "root" else run) / file
    path.write_bytes(CONTENTS[what])
    opened = 0
    for arguments in ({"readonly": True}, {}):
        with told(file.rpartition("/")[2]), AdapterStore(archive=run, **arguments) as store:
            opened += 1
            assert {1, 3} <= {version.number for version in store.list()}
            for number in (1, 2, 3):
                store.verify(number)
    assert opened == 2 or SPOILED[file] is StoreCorrupt


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "socket"])
@pytest.mark.parametrize("file", [*SPOILED, "HEAD", "rollbacks.jsonl", "requests/000001.json", "versions"])
@pytest.mark.parametrize("half", ["root", "run"])
def test_what_should_be_a_file_and_is_none_never_hangs(
    run: Path, shm_dir: Path, file: str, kind: str, half: str
) -> None:
    import socket

    path = (shm_dir if half == "root" else run) / file
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            os.chdir(path.parent)
            bound.bind(path.name)
            os.chdir(Path(__file__).parent.parent)
    else:
        {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir}.get(kind, lambda: path.symlink_to(path))()
    for look in (
        lambda: AdapterStore(archive=run, readonly=True).list(),
        lambda: holder(run),
        lambda: RollbackLog(run),
        lambda: request(run, "pin", number=1),
        lambda: opened_and_used(run),
    ):
        with told(""):
            look()


def test_a_pipe_among_the_files_of_a_state_or_a_version_never_hangs(run: Path, shm_dir: Path) -> None:
    with AdapterStore(archive=run) as store:
        store.archive_state(3, {"state.safetensors": [b"s"]}, {"step": 3})
        store.flush()
        version = store.get(3)
        for folder in (run / "states" / "000003", run / "versions" / "000003", version.path):
            for path in sorted(folder.iterdir()):
                content = path.read_bytes()
                path.unlink()
                os.mkfifo(path)
                looks: list[Callable[[], object]] = [lambda: store.verify(3)]
                if folder == version.path and path.name != "version.json":
                    looks.append(lambda: open_adapter(version))
                for look in looks:
                    with in_time(path), pytest.raises(LoraGrpoError, match=f"{path}|{folder}"):
                        look()
                path.unlink()
                path.write_bytes(content)
        store.verify(3)


@contextmanager
def in_time(path: Path) -> Iterator[None]:
    """Fails where a pipe is waited for; a writer that comes after a while ends the wait."""
    woken = threading.Timer(20, lambda: path.open("r+b").close())
    woken.start()
    started = time.monotonic()
    yield
    woken.cancel()
    assert time.monotonic() - started < 20, f"{path} was waited for"


def opened_and_used(run: Path) -> None:
    with AdapterStore(archive=run) as store:
        pending(store.archive)
        store.promote(store.publish(adapter(4), step=4))
        store.flush()


@pytest.mark.parametrize("half", ["root", "run"])
def test_temporary_files_of_a_killed_process_are_swept(run: Path, shm_dir: Path, half: str) -> None:
    names = [".HEAD.new", ".store.json.new", ".NUMBERS.new", ".journal.jsonl.new", ".rollbacks.jsonl.new"]
    folder = shm_dir if half == "root" else run
    for name in names:
        (folder / name).symlink_to("versions/000001") if name == ".HEAD.new" else (folder / name).touch()
    (run / "requests").mkdir(exist_ok=True)
    (run / "requests" / ".123.new").touch()
    os.utime(run / "requests" / ".123.new", (1, 1))
    AdapterStore(archive=run).close()
    assert not [name for name in names if os.path.lexists(folder / name)]
    assert not list((run / "requests").iterdir())


def test_another_users_folders_on_tmpfs_are_left_alone_and_do_not_hang(tmp_path: Path) -> None:
    """Names that a process of ours could have chosen, made by somebody else, with a pipe where a lock would be."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's folder")
    made = []
    try:
        for name in ("lora-grpo-engine-zzzzzzzz", "lora-grpo-engine-yyyyyyyy"):
            folder = Path("/dev/shm") / name
            folder.mkdir(mode=0o755)
            made.append(folder)
            os.mkfifo(folder / "LOCK")
        os.chown(made[0], 12345, 12345)
        code = (
            "from lora_grpo.engines.server.replica import Names\n"
            "names = Names(); print(names.is_leftover(f'lora-grpo.{names._place}.zzzzzzzz.r.v1.1'))\n"
            "names.close()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
        assert (made[0] / "LOCK").exists()
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def test_a_recorded_root_that_somebody_else_made_is_not_opened(tmp_path: Path) -> None:
    """A root of the store's own choosing is gone after a clean stop; its name is known to everybody."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's folder")
    with AdapterStore(archive=tmp_path) as store:
        store.promote(store.publish(adapter(1), step=1))
        before = store.root
    before.mkdir()
    try:
        os.mkfifo(before / "LOCK")
        os.chown(before, 12345, 12345)
        with AdapterStore(archive=tmp_path) as store:
            assert store.root != before
            sound(store, [1])
            assert store.head == store.get(1)
        assert (before / "LOCK").exists()
    finally:
        shutil.rmtree(before)


def test_a_name_of_this_user_whose_lock_is_no_file_is_not_judged() -> None:
    names = Names()
    try:
        (names.folder / "LOCK").unlink()
        os.mkfifo(names.folder / "LOCK")
        Names().close()
        assert names.folder.exists()
    finally:
        names.close()


@pytest.mark.parametrize("meta", [{}, {"extra": {}}, {"extra": {"epoch": 3}}, {"extra": None}])
def test_a_run_of_the_users_own_loop_is_rolled_back_while_stopped(run: Path, meta: dict[str, Any]) -> None:
    """What its loop wrote beside the trainer state is its own business."""
    with AdapterStore(archive=run) as store:
        store.archive_state(3, {"weights": [b"w"]}, meta)
    with AdapterStore(archive=run) as store:
        assert roll_back_stopped(store, 1).sampler is None
        assert store.head == store.get(1)
