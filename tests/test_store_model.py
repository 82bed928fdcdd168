"""The store against a model of it: any sequence of operations, with stops, kills and reboots in between."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_best, keep_every, keep_latest
from lora_grpo.errors import StoreError, UnknownVersion
from tests.store_files import adapter, content, on_disk

RETENTION = keep_latest(2) | keep_best("reward") | keep_every(5)


class StoreMachine(RuleBasedStateMachine):
    """`live` and `archived` are what is on tmpfs and in the archive; `contents` is every version ever published."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="lora-grpo-test-"))
        self.contents: dict[int, dict[str, bytes]] = {}
        self.parents: dict[int, int | None] = {}
        self.rewards: dict[int, float] = {}
        self.live: set[int] = set()
        self.archived: set[int] = set()
        self.pins: set[int] = set()
        self.leases: list[int] = []
        self.promoted: list[int] = []
        self.used = 0

    @initialize(archive=st.booleans())
    def start(self, archive: bool) -> None:
        self.run = self.folder / "run" if archive else None
        self.open()

    def open(self) -> None:
        self.store = AdapterStore(self.folder / "root", self.run, retention=RETENTION)

    @property
    def head(self) -> int | None:
        return self.promoted[-1] if self.promoted else None

    def known(self) -> list[int]:
        return sorted(self.live | self.archived)

    @rule(seed=st.integers(0, 1 << 30), size=st.integers(0, 5000), promote=st.booleans())
    def publish(self, seed: int, size: int, promote: bool) -> None:
        version = self.store.publish(adapter(seed, size), step=seed)
        assert version.number > self.used
        assert version.parent == self.head
        self.used = version.number
        self.contents[version.number] = content(adapter(seed, size))
        self.parents[version.number] = version.parent
        self.live.add(version.number)
        if self.run is not None:
            self.store.flush()
            self.archived.add(version.number)
        if promote:
            self.store.promote(version)
            self.promoted.append(version.number)

    @precondition(lambda self: self.known())
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.known()))
        if number in self.live:
            self.store.promote(number)
            self.promoted.append(number)
        else:
            with pytest.raises(UnknownVersion, match="archive only"):
                self.store.promote(number)

    @precondition(lambda self: self.known())
    @rule(data=st.data(), reward=st.floats(-1, 1))
    def record(self, data: st.DataObject, reward: float) -> None:
        number = data.draw(st.sampled_from(self.known()))
        self.store.record(number, reward=reward)
        self.rewards[number] = reward

    @precondition(lambda self: self.known())
    @rule(data=st.data())
    def pin_or_unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.known()))
        (self.store.unpin if number in self.pins else self.store.pin)(number)
        self.pins ^= {number}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.live)))
        self.store.acquire(number)
        self.leases.append(number)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.leases))
        self.store.release(number)
        self.leases.remove(number)

    def kept(self) -> set[int]:
        """What retention, pins, leases and the head keep on tmpfs."""
        ranked = sorted((reward, number) for number, reward in self.rewards.items() if number in self.live)
        keep = (
            set(sorted(self.live)[-2:]) | {number for _, number in ranked[-1:]} | {n for n in self.live if n % 5 == 0}
        )
        return self.live & (keep | self.pins | set(self.leases) | {self.head})

    @rule()
    def prune(self) -> None:
        kept = self.kept()
        assert self.store.prune() == sorted(self.live - kept)
        self.live = kept

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.contents)))
        if number in self.known():
            assert self.store.restore(number).number == number
            self.live.add(number)
        else:
            with pytest.raises(UnknownVersion):
                self.store.restore(number)

    @rule(how=st.sampled_from(["stop", "kill", "reboot"]))
    def reopen(self, how: str) -> None:
        if how == "stop":
            self.store.close()
            if self.run is not None:
                self.live = self.kept()
        else:
            abandon(self.store)
        self.leases.clear()
        if how == "reboot" and self.run is not None:
            shutil.rmtree(self.folder / "root")
            self.live.clear()
        self.open()
        assert self.store.recovered.lost == ()
        while self.promoted and self.promoted[-1] not in self.known():
            self.promoted.pop()
        if self.head is not None:
            self.live.add(self.head)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        assert [version.number for version in self.store.list()] == self.known()
        head = self.store.head
        assert (None if head is None else head.number) == self.head
        assert self.store.pins == self.pins
        for version in self.store.list():
            number = version.number
            assert version.parent == self.parents[number]
            assert ("tmpfs" in self.store.where(number)) == (number in self.live)
            assert ("archive" in self.store.where(number)) == (number in self.archived)
            assert self.store.metrics(number).get("reward") == self.rewards.get(number)
            self.store.verify(number)
            if number in self.live:
                assert on_disk(version.path) == self.contents[number]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder)


def abandon(store: AdapterStore) -> None:
    """Lose a store's locks and leases as its process would by dying, without closing anything else."""
    session = store._session
    assert session is not None
    session.leases.close()
    session.lock.close()
    with pytest.raises(StoreError, match="closed"):
        store.promote(1)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
