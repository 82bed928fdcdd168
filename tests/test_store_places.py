"""Runs that are copied, moved, restored and opened on two machines: which half of a store is believed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped
from lora_grpo.errors import StoreError
from tests.crash.moments import at
from tests.store_files import adapter, content, on_disk


def train(store: AdapterStore, *seeds: int) -> None:
    """Publish and promote a version for each seed."""
    for seed in seeds:
        store.promote(store.publish(adapter(seed), step=seed))


def left(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def head_of(store: AdapterStore) -> tuple[int, dict[str, bytes]]:
    assert store.head is not None
    store.verify(store.head.number)
    return store.head.number, on_disk(store.head.path)


def test_a_copied_run_leaves_the_original_alone(shm_dir: Path, tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    with AdapterStore(shm_dir / "root", original) as store:
        train(store, 1, 2, 3)
        run = store.run
    shutil.copytree(original, copy)
    before = left(shm_dir / "root"), left(original)
    with AdapterStore(archive=copy, readonly=True) as reader:
        assert reader.head is not None
        assert reader.head.number == 3
    with AdapterStore(archive=copy) as store:
        assert store.root != shm_dir / "root"
        assert store.recovered.copied_from == original
        assert head_of(store) == (3, content(adapter(3)))
        assert store.run.rpartition("-")[2] != run.rpartition("-")[2]
        train(store, 14, 15)
        assert store.head == store.get(5)
    assert (left(shm_dir / "root"), left(original)) == before
    with AdapterStore(archive=original) as store:
        assert store.root == shm_dir / "root"
        assert store.recovered.copied_from is None
        assert [version.number for version in store.list()] == [1, 2, 3]
        assert head_of(store) == (3, content(adapter(3)))
        train(store, 4)
        assert store.run == run
    with AdapterStore(archive=copy) as store:
        assert store.recovered.copied_from is None
        assert head_of(store) == (5, content(adapter(15)))


def test_a_copy_may_be_opened_while_the_original_is_live(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path / "original") as live:
        train(live, 1, 2)
        live.flush()
        shutil.copytree(tmp_path / "original", tmp_path / "copy")
        with AdapterStore(archive=tmp_path / "copy") as store:
            assert roll_back_stopped(store, 1).to == 1
            assert head_of(store) == (1, content(adapter(1)))
        train(live, 3)
        assert head_of(live) == (3, content(adapter(3)))


def test_a_copy_is_not_given_the_originals_root_by_name(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir / "root", tmp_path / "original") as store:
        train(store, 1)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    before = left(shm_dir), left(tmp_path)
    with pytest.raises(StoreError, match=r"is a copy of the run in .*original, which uses the root .*; give"):
        AdapterStore(shm_dir / "root", tmp_path / "copy")
    assert (left(shm_dir), left(tmp_path)) == before
    with AdapterStore(shm_dir / "other", tmp_path / "copy") as store:
        assert head_of(store) == (1, content(adapter(1)))


def test_after_a_reboot_a_copy_still_leaves_the_original_its_root(tmp_path: Path) -> None:
    """A root of the store's own choosing goes when it is closed; its name is still the original's."""
    with AdapterStore(archive=tmp_path / "original") as store:
        train(store, 1, 2)
        root, run = store.root, store.run
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    with AdapterStore(archive=tmp_path / "copy") as copy, AdapterStore(archive=tmp_path / "original") as store:
        train(copy, 13)
        assert (store.root, store.run) == (root, run)
        assert copy.root != root
        assert head_of(store) == (2, content(adapter(2)))


@pytest.mark.parametrize("place_taken", [False, True])
def test_a_moved_run_keeps_its_root(shm_dir: Path, tmp_path: Path, place_taken: bool) -> None:
    """Also where a new run was begun in its old place."""
    with AdapterStore(shm_dir / "root", tmp_path / "before") as store:
        train(store, 1, 2)
        run_id = store.run.rpartition("-")[2]
    (tmp_path / "before").rename(tmp_path / "after")
    if place_taken:
        with AdapterStore(shm_dir / "other", tmp_path / "before") as store:
            train(store, 11)
    for _ in range(2):
        with AdapterStore(archive=tmp_path / "after") as store:
            assert store.root == shm_dir / "root"
            assert store.recovered.copied_from is None
            assert store.run.rpartition("-")[2] == run_id
            assert head_of(store) == (2, content(adapter(2)))


def test_a_run_under_another_name_of_its_folder_is_itself(shm_dir: Path, tmp_path: Path) -> None:
    """A folder mounted in two places: both paths are there, with one inode."""
    with AdapterStore(shm_dir, tmp_path / "run") as store:
        train(store, 1)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in (tmp_path / "run", shm_dir):
        identity = json.loads((folder / "store.json").read_text())
        named = {key: str(tmp_path / "link") for key, value in identity.items() if value == str(tmp_path / "run")}
        (folder / "store.json").write_text(json.dumps({**identity, **named}))
    with AdapterStore(archive=tmp_path / "run") as store:
        assert store.root == shm_dir
        assert store.recovered.copied_from is None


def other_machine(run: Path, root: Path, *seeds: int) -> None:
    """Train on where there is another /dev/shm: the root of here is out of sight meanwhile."""
    root.rename(root.with_name("hidden"))
    with AdapterStore(root, run) as store:
        train(store, *seeds)
    shutil.rmtree(root)
    root.with_name("hidden").rename(root)


@pytest.mark.parametrize("named", [True, False])
def test_a_root_that_is_out_of_date_does_not_win(shm_dir: Path, tmp_path: Path, named: bool) -> None:
    root, run = shm_dir / "root", tmp_path / "run"
    with AdapterStore(root, run) as store:
        train(store, 1, 2, 3)
    other_machine(run, root, 4, 5, 6, 7)
    shutil.copytree(root / "versions" / "000003", root / "versions" / "000900")
    with AdapterStore(archive=run, readonly=True) as reader:
        assert reader.head is not None
        assert reader.head.number == 7
    with AdapterStore(root if named else None, run) as store:
        assert head_of(store) == (7, content(adapter(7)))
        assert [version.number for version in store.list()] == [1, 2, 3, 4, 5, 6, 7]
        (aside,) = store.recovered.set_aside
        assert [path.name for path in (aside / "versions").iterdir()] == ["000900"]
        assert os.readlink(aside / "HEAD") == "versions/000003"
        train(store, 8)
        assert store.head == store.get(8)
        assert not store.recovered.lost
    with AdapterStore(archive=run) as store:
        assert head_of(store) == (8, content(adapter(8)))
        assert store.recovered.set_aside == (aside,)


def test_what_a_killed_process_did_not_archive_is_set_aside_not_lost(shm_dir: Path, tmp_path: Path) -> None:
    """Killed on one machine with a version on tmpfs alone, trained on another, opened on the first again."""
    root, run = shm_dir / "root", tmp_path / "run"
    child = os.fork()
    if child == 0:
        store = AdapterStore(root, run)
        train(store, 1, 2)
        store.flush()
        at("archive.copied", lambda _: os._exit(0))
        train(store, 3)
        store.flush()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    other_machine(run, root, 13, 14)
    with AdapterStore(root, run) as store:
        number, files = head_of(store)
        assert files == content(adapter(14))
        assert number > 60, "numbers that may have been given out came back"
        (aside,) = store.recovered.set_aside
        assert on_disk(aside / "versions" / "000003") == content(adapter(3))


def test_a_root_that_is_newer_than_a_restored_run_wins(shm_dir: Path, tmp_path: Path) -> None:
    root, run = shm_dir / "root", tmp_path / "run"
    with AdapterStore(root, run) as store:
        train(store, 1, 2)
    shutil.copytree(run, tmp_path / "backup")
    with AdapterStore(root, run) as store:
        train(store, 3)
    shutil.rmtree(run)
    (tmp_path / "backup").rename(run)
    with AdapterStore(root, run) as store:
        assert head_of(store) == (3, content(adapter(3)))
        assert not store.recovered.set_aside
        store.flush()
        assert store.where(3) == {"tmpfs", "archive"}
