"""The store in ordinary life: publish, promote, read, record, lease, prune."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lora_grpo.adapters.files.catalog import link_head
from lora_grpo.adapters.files.disk import Tree, digest_buffers
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_latest
from lora_grpo.errors import ConfigError, StoreError, UnknownVersion
from tests.store_files import adapter, content, digest_of, on_disk


def test_a_version_is_the_bytes_that_were_published(shm_dir: Path) -> None:
    with AdapterStore(shm_dir) as store:
        version = store.publish(adapter(1), step=7)
        assert on_disk(version.path) == content(adapter(1))
        assert (version.number, version.parent, version.step) == (1, None, 7)
        assert version.digest == digest_buffers(adapter(1)) == digest_of(version.path)
        assert store.get(1) == version
        assert json.loads((version.path / "version.json").read_text())["sizes"] == {
            "adapter_config.json": len(b'{"seed": 1}'),
            "adapter_model.safetensors": 3000,
        }


def test_digest_depends_on_bytes_and_names_not_on_how_they_are_split() -> None:
    whole = {"a": [b"12345678"], "b": [b"xyz"]}
    split = {"b": [b"x", memoryview(b"yz")], "a": [b"", b"123", bytearray(b"45678")]}
    assert digest_buffers(whole) == digest_buffers(split)
    moved = {"a": [b"1234567"], "b": [b"8xyz"]}
    renamed = {"a": [b"12345678"], "c": [b"xyz"]}
    assert len({digest_buffers(files) for files in (whole, moved, renamed)}) == 3


def test_buffers_of_any_element_type_and_number_are_written_whole(shm_dir: Path) -> None:
    """Many buffers, some empty, some of doubles."""
    doubles = memoryview(bytes(range(8)) * 500).cast("d")
    files = {"adapter_model.safetensors": [b"ab", b"", doubles] * 900, "adapter_config.json": [b""]}
    with AdapterStore(shm_dir) as store:
        version = store.publish(files, step=0)
        assert on_disk(version.path)["adapter_model.safetensors"] == (b"ab" + bytes(range(8)) * 500) * 900
        store.verify(1)


def test_publish_does_not_move_head_and_parents_follow_it(shm_dir: Path) -> None:
    with AdapterStore(shm_dir) as store:
        first = store.publish(adapter(1), step=0)
        assert store.head is None
        store.promote(first)
        second = store.publish(adapter(2), step=1)
        assert store.head == first
        assert second.parent == 1
        store.promote(second)
        store.promote(1)
        third = store.publish(adapter(3), step=2)
        assert (third.number, third.parent) == (3, 1)
        assert store.publish(adapter(4), step=2, parent=second).parent == 2
        assert store.publish(adapter(5), step=2, parent=None).parent is None
        with pytest.raises(UnknownVersion, match="parent=99"):
            store.publish(adapter(6), step=2, parent=99)
        assert (shm_dir / "HEAD").resolve() == first.path


def test_a_promotion_that_is_interrupted_after_its_rename_is_taken_back(
    shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdapterStore(shm_dir, tmp_path / "run") as store:
        first, second = (store.publish(adapter(step), step=step) for step in (1, 2))
        store.promote(first)

        def interrupted(root: Tree, number: int) -> None:
            monkeypatch.undo()
            link_head(root, number)
            raise KeyboardInterrupt

        monkeypatch.setattr("lora_grpo.adapters.store.link_head", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.promote(second)
        assert store.head == first
    shutil.rmtree(shm_dir)
    with AdapterStore(shm_dir, tmp_path / "run") as store:
        assert store.head == first


def test_everything_is_for_the_owner_only(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir / "root", tmp_path / "run") as store:
        store.promote(store.publish(adapter(1), step=0))
        store.flush()
        paths = [shm_dir / "root", *(shm_dir / "root").rglob("*"), *(tmp_path / "run").rglob("*")]
        modes = {stat.S_IMODE(path.lstat().st_mode) for path in paths if not path.is_symlink()}
        assert modes == {0o700, 0o600}


def test_another_set_of_files_is_refused(shm_dir: Path) -> None:
    with AdapterStore(shm_dir) as store:
        with pytest.raises(ConfigError, match=r"adapter_config\.json"):
            store.publish({"adapter_model.safetensors": [b"x"]}, step=0)
        with pytest.raises(ConfigError, match="extra"):
            store.publish({**adapter(1), "extra": [b"x"]}, step=0)
        assert store.list() == []


def test_metrics_are_beside_the_version_and_outlive_it(shm_dir: Path) -> None:
    with AdapterStore(shm_dir, retention=keep_latest(1)) as store:
        for step in range(2):
            store.promote(store.publish(adapter(step), step=step))
        store.record(1, reward=0.25, note="first")
        store.record(1, reward=0.5, kl=float("nan"), rows=64)
        assert store.metrics(1) == {"reward": 0.5, "note": "first", "kl": None, "rows": 64}
        assert store.metrics(2) == {}
        store.verify(1)
        assert store.prune() == [1]
        store.record(1, late=1)
        with pytest.raises(UnknownVersion, match="no version 3"):
            store.record(3, reward=1.0)
        with pytest.raises(ConfigError, match="reward=\\[1"):
            store.record(2, reward=[1])  # type: ignore[arg-type]
    with AdapterStore(shm_dir) as store:
        assert store.metrics(1)["late"] == 1


def test_numbers_go_on_after_pruning_and_reopening(shm_dir: Path) -> None:
    with AdapterStore(shm_dir, retention=keep_latest(1)) as store:
        for step in range(3):
            store.promote(store.publish(adapter(step), step=step))
        store.publish(adapter(3), step=3)
        store.promote(1)
        assert store.prune() == [2, 3]
    with AdapterStore(shm_dir) as store:
        assert [version.number for version in store.list()] == [1, 4]
        assert store.publish(adapter(5), step=4).number == 5
        with pytest.raises(UnknownVersion, match="removed by retention"):
            store.get(3)
        with pytest.raises(UnknownVersion, match="no version 77"):
            store.get(77)


def test_pruning_leaves_head_pins_and_leases_of_any_process(shm_dir: Path) -> None:
    with AdapterStore(shm_dir, retention=keep_latest(1)) as store:
        for step in range(6):
            store.publish(adapter(step), step=step)
        store.promote(1)
        store.pin(2)
        reader = AdapterStore(shm_dir, readonly=True)
        with store.lease(3), reader.lease(4) as version:
            assert version == store.get(4)
            assert store.prune() == [5]
            store.acquire(3)
        assert store._catalog.leases.by_key.keys() == {3}
        assert store.prune() == [4]
        store.release(3)
        store.unpin(2)
        assert store.prune() == [2, 3]
        for call in (store.release, store.unpin, store.acquire, store.promote, store.pin, store.restore):
            with pytest.raises(UnknownVersion, match="3"):
                call(3)
        assert [version.number for version in store.list()] == [1, 6]


def test_a_lease_on_a_version_that_is_just_being_removed_leaves_nothing_open(
    shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdapterStore(shm_dir) as store:
        version = store.publish(adapter(1), step=0)
        opened = os.listdir("/proc/self/fd")
        with monkeypatch.context() as removing:
            removing.setattr("fcntl.flock", lambda descriptor, kind: shutil.rmtree(version.path))
            with pytest.raises(UnknownVersion, match="removed from tmpfs just now"):
                store.acquire(version)
        assert len(os.listdir("/proc/self/fd")) == len(opened)


def test_a_lease_on_head_ends_where_head_was(shm_dir: Path) -> None:
    with AdapterStore(shm_dir) as store:
        first, second = (store.publish(adapter(step), step=step) for step in range(2))
        store.promote(first)
        with store.lease("head") as held:
            store.promote(second)
            assert held == first
            assert store._catalog.leases.by_key.keys() == {1}
        assert not store._catalog.leases.by_key


def test_a_lease_ends_with_its_process(shm_dir: Path) -> None:
    """A lease file of a dead process would keep its version for ever."""
    with AdapterStore(shm_dir, retention=keep_latest(1)) as store:
        for step in range(2):
            store.promote(store.publish(adapter(step), step=step))
        program = (
            "import sys\nfrom lora_grpo.adapters.store import AdapterStore\n"
            "AdapterStore(sys.argv[1], readonly=True).acquire(1); print('leased', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(shm_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "leased\n"
            assert store.prune() == []
            other.kill()
            other.wait()
        assert store.prune() == [1]


def test_readers_follow_a_live_writer(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir, tmp_path / "run") as store:
        readers = [
            AdapterStore(archive=tmp_path / "run", readonly=True),
            AdapterStore(shm_dir, readonly=True),
        ]
        for reader in readers:
            assert reader.list() == []
            assert reader.head is None
        version = store.publish(adapter(1), step=0)
        store.promote(version)
        store.record(version, reward=1.5)
        store.pin(1)
        for reader in readers:
            assert reader.list() == [version]
            assert reader.head == version
            assert reader.metrics(1) == {"reward": 1.5}
            assert reader.pins == {1}
            reader.verify(1)
            with pytest.raises(StoreError, match="readonly"):
                reader.publish(adapter(2), step=1)
            with pytest.raises(StoreError, match="readonly"):
                reader.prune()


def test_reading_where_there_is_no_store(shm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store in"):
        AdapterStore(shm_dir / "none", readonly=True)
    with pytest.raises(StoreError, match="no store in"):
        AdapterStore(archive=tmp_path, readonly=True)
    with pytest.raises(StoreError, match="give the store's root"):
        AdapterStore(readonly=True)
    assert list(tmp_path.iterdir()) == []


def test_a_root_of_the_stores_own_choosing_goes_with_it() -> None:
    with AdapterStore() as store:
        root = store.root
        assert root.parent == Path("/dev/shm")
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        store.promote(store.publish(adapter(1), step=0))
    assert not root.exists()
    with pytest.raises(StoreError, match="closed"):
        store.publish(adapter(2), step=1)


def test_a_forked_child_neither_writes_nor_keeps_the_lock(shm_dir: Path) -> None:
    """An engine worker forked by the trainer may outlive it; inherited descriptors would keep the run locked."""
    store = AdapterStore(shm_dir)
    store.promote(store.publish(adapter(1), step=0))
    store.acquire(1)
    ask, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        refused = False
        try:
            store.publish(adapter(2), step=1)
        except StoreError:
            refused = True
        os.write(told[1], b"refused" if refused else b"written")
        os.read(ask[0], 1)
        os._exit(0)
    assert os.read(told[0], 7) == b"refused"
    store.close()
    with AdapterStore(shm_dir, retention=keep_latest(1)) as again:
        again.promote(again.publish(adapter(2), step=1))
        assert again.prune() == [1]
    os.write(ask[1], b"x")
    os.waitpid(child, 0)
    for end in (*ask, *told):
        os.close(end)


def test_a_disk_instead_of_tmpfs_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="not on tmpfs: every publish and load must wait for the disk"):
        store = AdapterStore(tmp_path / "root")
    store.promote(store.publish(adapter(1), step=0))
    store.verify(1)
    store.close()


def test_a_foreign_folder_is_refused_as_root(shm_dir: Path) -> None:
    (shm_dir / "somebody's.txt").write_text("data")
    with pytest.raises(StoreError, match="its own folder"):
        AdapterStore(shm_dir)
    assert [path.name for path in shm_dir.iterdir()] == ["somebody's.txt"]


def test_importing_the_store_is_light() -> None:
    program = "import sys, lora_grpo.adapters.store; print({'torch', 'vllm', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
