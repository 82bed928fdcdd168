"""What a store keeps that was told nothing, and what it says of the rest."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_grpo import AdapterStore, FakeEngine, NativeSync, Retention, Sampling, keep_latest
from lora_grpo.adapters.upkeep.retention import retention
from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped
from lora_grpo.config import KeepConfig
from lora_grpo.errors import NoRoom, UnknownVersion
from tests.store_files import adapter
from tests.test_fake_engine import tiny_peft


def on_tmpfs(root: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(root / "versions"))


def publish(store: AdapterStore, count: int) -> Iterator[int]:
    """A loop around a store of its own making, as `NativeSync.push` treats one."""
    for step in range(count):
        version = store.publish(adapter(step), step=step)
        store.promote(version)
        store.prune()
        yield version.number


def test_the_readmes_loop_is_flat_on_tmpfs_and_loses_nothing(shm_dir: Path, tmp_path: Path) -> None:
    root, model = shm_dir / "my-run", tiny_peft()
    store = AdapterStore(root, archive=tmp_path / "my-run")
    engine = FakeEngine(lambda prompt, version, seed: "4")
    sync = NativeSync(model, engine, store)
    for step in range(100):
        version = sync.push(step=step)
        engine.generate(["2+2="], Sampling(n=2), adapter=version)
        if step == 3:
            store.pin(version)
        # What the archive has not got yet stays as well; how much that is depends on the disk.
        store.flush()
        assert len(on_tmpfs(root)) <= 8 + 1 + 1
    store.prune()
    assert on_tmpfs(root) == [4, *range(93, 101)]
    sync.push(step=100)
    store.close()
    assert on_tmpfs(root) == [4, *range(94, 102)]
    with AdapterStore(root, archive=tmp_path / "my-run") as again:
        assert [version.number for version in again.list()] == list(range(1, 102))
        assert again.restore(1).path.is_dir()


def test_what_best_names_keeps_its_trainer_state() -> None:
    """ "best" goes by held-out reward where there is one, so a rollback there has to be exact too."""
    metrics = [{"reward": 0.2, "eval/reward": 0.9}, {"reward": 0.8}, *[{"reward": 0.5, "eval/reward": 0.6}] * 4]
    assert retention(KeepConfig(trainer_states=2)).kept("state", dict(enumerate(metrics, 1))) == {1, 2, 5, 6}


def test_without_an_archive_the_last_64_and_the_best_stay_and_the_first_removal_is_warned_of(shm_dir: Path) -> None:
    with AdapterStore(shm_dir) as store:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            loop = publish(store, 70)
            for number in loop:
                if number in (1, 2, 3):
                    store.record(number, **{("reward", "eval/reward", "loss")[number - 1]: 0.5})
                if number == 4:
                    store.pin(4)
                if number == 66:
                    break
        # 1 and 2 are the best of their metrics, and 4 is pinned: the third is the first to go, of 67.
        assert on_tmpfs(shm_dir) == [*range(1, 67)]
        words = "removes version 3 for good: it keeps the last 64, the 1 with the highest 'reward'"
        with pytest.warns(RuntimeWarning, match=f"has no archive, and {words}.*archive=DIR.*retention=Retention"):
            next(loop)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert [*loop] == [68, 69, 70]
        assert on_tmpfs(shm_dir) == [1, 2, 4, *range(7, 71)]
        for ask in (store.get, store.restore, store.promote):
            with pytest.raises(
                UnknownVersion, match="version 5 was removed by retention: tmpfs keeps the last 64, the"
            ):
                ask(5)
    with AdapterStore(shm_dir, readonly=True) as reader, pytest.raises(UnknownVersion, match="tmpfs keeps the last 64"):
        reader.get(6)


def test_a_retention_without_rules_keeps_all_and_one_that_was_asked_for_is_not_warned_of(shm_dir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with AdapterStore(shm_dir / "all", retention=Retention()) as store:
            assert [*publish(store, 70)] == on_tmpfs(shm_dir / "all")
        with AdapterStore(shm_dir / "two", retention=keep_latest(2)) as store:
            assert [*publish(store, 5)][-2:] == on_tmpfs(shm_dir / "two")


def test_what_left_the_archive_says_by_which_rule(shm_dir: Path, tmp_path: Path) -> None:
    from lora_grpo import keep_archived

    kept = keep_latest(1) | keep_archived(keep_latest(2))
    with AdapterStore(shm_dir, tmp_path / "run", retention=kept) as store:
        for _ in publish(store, 6):
            store.flush()
        with pytest.raises(UnknownVersion, match="version 2 was removed by retention: the archive keeps the last 2"):
            roll_back_stopped(store, 2)


def test_a_full_tmpfs_is_helped_by_what_the_error_advises(shm_dir: Path) -> None:
    budget = 5 * 3100
    with AdapterStore(shm_dir, budget_bytes=budget, retention=Retention()) as store:
        with pytest.raises(NoRoom, match=r"tmpfs keeps everything, HEAD, pinned.*retention=keep_latest\(2\)") as full:
            [*publish(store, 9)]
        assert store.prune() == []
    assert "prune()" not in str(full.value)
    with AdapterStore(shm_dir, budget_bytes=budget, retention=keep_latest(2)) as store:
        assert len([*publish(store, 9)]) == 9
