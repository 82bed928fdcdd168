"""What killed processes leave on tmpfs: removed where an archive has it, told of where not, and never in use."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.locks import OwnFolder
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.ended import SERVING
from lora_grpo.adapters.upkeep.retention import Retention
from tests.store_files import adapter, content, on_disk

PROGRAM = """
import os, signal, sys
from pathlib import Path
from lora_grpo.adapters.files import disk
from lora_grpo.adapters.store import AdapterStore
from tests.store_files import adapter

disk._SHM = Path(sys.argv[1])
store = AdapterStore(archive=sys.argv[2] or None)
for seed in (1, 2, 3):
    store.promote(store.publish(adapter(seed), step=seed))
    if sys.argv[2]:
        store.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def home(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A /dev/shm of the test's own, and no warning that it does not wait for."""
    monkeypatch.setattr(disk, "_SHM", shm_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield shm_dir


def killed(home: Path, archive: Path | str = "") -> Path:
    """The root that a process left that was killed after three versions."""
    before = set(home.iterdir())
    subprocess.run([sys.executable, "-c", PROGRAM, home, archive], check=False)
    [root] = set(home.iterdir()) - before
    return root


def open_another(path: Path) -> None:
    with AdapterStore(archive=path / "another"):
        pass


def test_the_next_store_removes_what_an_archive_has(home: Path, tmp_path: Path) -> None:
    root = killed(home, tmp_path / "run")
    open_another(tmp_path)
    assert not root.exists()
    with AdapterStore(archive=tmp_path / "run") as store:
        assert store.recovered == type(store.recovered)()
        assert store.head is not None
        assert on_disk(store.head.path) == content(adapter(3))
        assert store.publish(adapter(4), step=4).number == 4
    assert not [*home.iterdir()]


def test_its_own_run_goes_on_with_it(home: Path, tmp_path: Path) -> None:
    root = killed(home, tmp_path / "run")
    with AdapterStore(archive=tmp_path / "run") as store:
        assert store.root == root
        assert [version.number for version in store.list()] == [1, 2, 3]


@pytest.mark.parametrize(
    "left", ["no archive", "archive deleted", "not archived yet", "archive damaged", "another run there"]
)
def test_what_may_be_nowhere_else_is_told_of_and_kept(home: Path, tmp_path: Path, left: str) -> None:
    run = tmp_path / "run"
    root = killed(home, "" if left == "no archive" else run)
    if left == "archive deleted":
        run.rename(tmp_path / "moved")
    if left == "not archived yet":
        (run / "versions" / "000003").rename(tmp_path / "000003")
    if left == "archive damaged":
        (run / "versions" / "000003" / "version.json").write_text("{}")
    if left == "another run there":
        run.rename(tmp_path / "moved")
        with AdapterStore(home / "other", run, retention=Retention()) as other:
            for seed in range(9):
                other.publish(adapter(seed), step=seed)
    with pytest.warns(RuntimeWarning, match=f"killed processes left 0.0 MiB .* in {root}: resume"):
        open_another(tmp_path)
    if left == "another run there":
        assert (run / "NUMBERS").read_text() == "9\n"
    for number in (1, 2, 3):
        assert on_disk(root / "versions" / f"{number:06d}") == content(adapter(number))


def test_what_somebody_uses_is_left_alone(home: Path, tmp_path: Path) -> None:
    root = killed(home, tmp_path / "run")
    reader = AdapterStore(archive=tmp_path / "run", readonly=True)
    reader.acquire(2)
    with AdapterStore(archive=tmp_path / "live") as live:
        live.publish(adapter(1), step=1)
        live.flush()
        open_another(tmp_path)
        assert on_disk(live.get(1).path) == content(adapter(1))
    assert on_disk(root / "versions" / "000002") == content(adapter(2))
    reader.close()


def test_what_a_closed_store_of_a_live_process_left_its_engine_is_no_killed_ones(home: Path, tmp_path: Path) -> None:
    store = AdapterStore(archive=tmp_path / "run")
    store.publish(adapter(1), step=1)
    store.acquire(1)
    store.close()
    [root] = home.iterdir()
    open_another(tmp_path)
    assert root.exists()


def test_what_servers_of_a_killed_process_may_read_stays_until_they_were_told(home: Path, tmp_path: Path) -> None:
    """A server that has evicted an adapter reads it again from its path, and ends where that is gone."""
    root, serving = killed(home, tmp_path / "run"), home / f"{SERVING}killed"
    serving.mkdir()
    (serving / "LOCK").touch()
    open_another(tmp_path)
    assert root.exists()
    OwnFolder.sweep(home, SERVING)  # as the next engine for servers does, once they have unloaded it
    open_another(tmp_path)
    assert not root.exists()


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(home: Path, tmp_path: Path) -> None:
    (home / "lora-grpo-odd").mkdir()
    os.mkfifo(home / "lora-grpo-odd" / "LOCK")
    open_another(tmp_path)
    assert (home / "lora-grpo-odd").is_dir()


def test_a_root_that_its_user_named_stays(home: Path, tmp_path: Path) -> None:
    with AdapterStore(home / "lora-grpo-mine", tmp_path / "run") as store:
        store.publish(adapter(1), step=1)
    lock = home / "lora-grpo-mine" / "LOCK"
    lock.write_text(lock.read_text().replace(str(os.getpid()), str(2**22 + 1)))  # above every process's number
    open_another(tmp_path)
    assert (home / "lora-grpo-mine" / "versions" / "000001").is_dir()
