"""What a store remembers of versions that are gone: everything on disk, next to nothing in memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.journal import Journal
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_archived, keep_latest, keep_trainer_state
from tests.store_files import adapter


def remembered(journal: Journal) -> int:
    """Entries that the journal holds in memory."""
    held = (journal.published, journal.promoted, journal.metrics, journal.states)
    return sum(map(len, held))


def test_memory_does_not_grow_with_the_number_of_versions(shm_dir: Path, tmp_path: Path) -> None:
    rules = keep_latest(3) | keep_archived(keep_latest(2)) | keep_trainer_state(keep_latest(1))
    sizes = []
    with AdapterStore(shm_dir, tmp_path / "run", retention=rules) as store:
        for step in range(1, 61):
            version = store.publish(adapter(step), step=step)
            store.promote(version)
            store.record(version, reward=step / 100)
            store.archive_state(version, {"state.safetensors": [b"state"]}, {"step": step})
            store.flush()
            store.prune()
            if step in (20, 60):
                sizes.append(remembered(store._catalog.journal))
        assert sizes[0] == sizes[1]
        assert store.metrics(4) == {"reward": 0.04}
        assert store.metrics(60) == {"reward": 0.6}
    with AdapterStore(shm_dir, tmp_path / "run") as store:
        assert remembered(store._catalog.journal) == sizes[0]
        assert store.metrics(4) == {"reward": 0.04}
        assert store.parent_of(4) == 3
        with pytest.raises(LookupError, match="version 4 was removed by retention"):
            store.get(4)
        with pytest.raises(LookupError, match="there is no version 61"):
            store.get(61)


def test_pruning_leaves_the_waiting_for_the_disk_to_the_archive_thread(
    shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = keep_archived(keep_latest(1)) | keep_trainer_state(keep_latest(1))
    waited: list[str] = []
    real = disk.sync_folder

    def noted(path: Path) -> None:
        waited.append(threading.current_thread().name)
        real(path)

    with AdapterStore(shm_dir, tmp_path / "run", retention=rules) as store:
        for step in (1, 2, 3):
            store.promote(store.publish(adapter(step), step=step))
            store.archive_state(step, {"state.safetensors": [b"state"]}, {"step": step})
        store.flush()
        monkeypatch.setattr(disk, "sync_folder", noted)
        store.prune()
        assert store.states == [3]
        assert store.where(1) == frozenset({"tmpfs"})
        store.flush()
        assert set(waited) == {"lora-grpo-archive"}
    assert not any((tmp_path / "run" / "trash").iterdir())


def test_a_state_pruned_twice_meets_its_own_leftover(shm_dir: Path, tmp_path: Path) -> None:
    rules = keep_trainer_state(keep_latest(1))
    with AdapterStore(shm_dir, tmp_path / "run", retention=rules) as store:
        store.promote(store.publish(adapter(1), step=1))
        store.promote(store.publish(adapter(2), step=2))
        (tmp_path / "run" / "trash" / "states-000001").mkdir()
        (tmp_path / "run" / "trash" / "states-000001" / "left").touch()
        store.archive_state(1, {"state.safetensors": [b"state"]}, {"step": 1})
        store.flush()
        store.archive_state(2, {"state.safetensors": [b"state"]}, {"step": 2})
        store.flush()
        store.prune()
        store.flush()
        assert store.states == [2]
    assert [path.name for path in (tmp_path / "run" / "trash").iterdir()] == ["states-000001"]
