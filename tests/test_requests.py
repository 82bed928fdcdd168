"""Requests to the process that holds a run: done once, by the holder that they were left for, or never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from lora_grpo.adapters.asking.requests import pending, request
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.cli.versions import change
from lora_grpo.errors import StoreError
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.trainer.run import apply_requests
from tests.store_files import adapter


class Said:
    """What the run reports."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def store(shm_dir: Path, tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(shm_dir, tmp_path / "run") as store:
        for step in range(3):
            store.promote(store.publish(adapter(step), step=step))
        store.flush()
        yield store


@pytest.fixture
def ask(store: AdapterStore) -> Iterator[Callable[..., Future[dict[str, Any]]]]:
    """A client in a thread of its own; returns when its request is there."""
    assert store.archive is not None
    run = store.archive

    def act(store: AdapterStore) -> dict[str, Any]:
        return {"done": "by the client itself", "head": store.head}

    with ThreadPoolExecutor(1) as clients:

        def start(timeout_s: float) -> Future[dict[str, Any]]:
            asking = clients.submit(change, run, "pin", act, timeout_s=timeout_s, version=1)
            until(lambda: bool(pending(store.archive)))
            return asking

        yield start


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "requests").iterdir())


def die(store: AdapterStore) -> None:
    """What a kill leaves: no lock, and everything else as it was."""
    assert store._session is not None
    store._session.lock.close()


def apply(store: AdapterStore) -> list[str]:
    said = Said()
    apply_requests(store, pytest.fail, cast(Reporter, said))
    return said.messages


def test_a_request_is_either_taken_back_or_done(store: AdapterStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = request(run, "pin", version=1), request(run, "pin", version=2)
    listed = pending(store.archive)
    assert first.withdraw()
    assert not listed[0].claim(), "it was taken back after the holder had looked"
    assert listed[1].claim()
    assert not second.withdraw()
    assert pending(store.archive) == []
    second.answer({"done": "pinned"})
    assert second.answered() == {"done": "pinned"}
    assert files(run) == []


def test_a_request_taken_back_while_others_are_done_is_left_out(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    asked = [request(run, "pin", version=version) for version in (1, 2)]
    real = store.pin

    def pin(number: int) -> None:
        asked[1].withdraw()
        real(number)

    monkeypatch.setattr(store, "pin", pin)
    assert apply(store) == ["asked from outside: pin 1: pinned"]
    assert store.pins == {1}


def test_a_request_that_was_taken_back_is_no_other_one(store: AdapterStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    taken_back = request(run, "pin", version=1)
    (listed,) = pending(store.archive)
    assert taken_back.withdraw()
    asked = request(run, "pin", version=2)
    assert not listed.claim()
    assert pending(store.archive) == [asked]


def test_requests_left_at_once_are_each_done_once_and_in_order(store: AdapterStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ThreadPoolExecutor(8) as clients:
        asked = list(clients.map(lambda index: [request(run, "pin", at=[index, n]) for n in range(25)], range(8)))
        listed = pending(store.archive)
        assert len(listed) == 200
        for own in asked:
            assert [each for each in listed if each in own] == own
        # Half of them are taken back while the holder begins with each: never both, never neither.
        taking = clients.map(lambda each: each.withdraw(), listed[::2])
        begun = [each.claim() for each in listed[::2]]
        assert [taken != claimed for taken, claimed in zip(taking, begun, strict=True)] == [True] * 100
    assert pending(store.archive) == listed[1::2]


def test_who_asked_is_told_of_what_nobody_foresaw(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    asked = request(run, "pin", version=1)

    def out_of_memory(number: int) -> None:
        raise MemoryError("CUDA out of memory")

    monkeypatch.setattr(store, "pin", out_of_memory)
    with pytest.raises(MemoryError):
        apply(store)
    assert asked.answered() == {"error": "MemoryError: CUDA out of memory", "kind": "EngineError"}
    assert files(run) == []


def test_an_answer_is_left_for_who_still_looks(store: AdapterStore, shm_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = [request(run, "pin", version=version) for version in (1, 2)]
    for each in asked:
        assert each.claim()
        each.answer({"done": "pinned"})
    os.utime(run / "requests" / f"{asked[1].name}.answer", (0, 0))
    store.close()
    with AdapterStore(shm_dir, run):
        assert files(run) == [f"{asked[0].name}.answer"]


def test_a_client_waits_for_what_is_begun_and_says_nothing_else(
    store: AdapterStore, tmp_path: Path, ask: Callable[..., Future[dict[str, Any]]]
) -> None:
    asking = ask(timeout_s=0.2)
    (asked,) = pending(store.archive)
    assert asked.claim()
    time.sleep(0.4)
    assert not asking.done()
    asked.answer({"done": "pinned"})
    assert asking.result(60) == {"live": True, "done": "pinned"}
    assert files(tmp_path / "run") == []


def test_a_client_that_nobody_listens_to_takes_its_request_back(
    store: AdapterStore, tmp_path: Path, ask: Callable[..., Future[dict[str, Any]]]
) -> None:
    asking = ask(timeout_s=0.2)
    with pytest.raises(StoreError, match=r"has not answered; the request was withdrawn, and nothing has changed\."):
        asking.result(60)
    assert apply(store) == []
    assert files(tmp_path / "run") == []


def test_a_holder_that_dies_while_doing_it_leaves_it_undone_for_good(
    store: AdapterStore, shm_dir: Path, tmp_path: Path, ask: Callable[..., Future[dict[str, Any]]]
) -> None:
    asking = ask(timeout_s=60)
    assert pending(store.archive)[0].claim()
    die(store)
    with pytest.raises(StoreError, match=r"ended while it was doing this; `lora-grpo versions .*run` shows"):
        asking.result(60)
    with AdapterStore(shm_dir, tmp_path / "run") as again:
        assert apply(again) == []
    os.utime(tmp_path / "run" / "requests" / files(tmp_path / "run")[0], (0, 0))
    with AdapterStore(shm_dir, tmp_path / "run"):
        assert files(tmp_path / "run") == [], "the answer that nobody came for"


def begin_and_die(store: AdapterStore, point: str) -> None:
    """What the holder has done of a request when it is killed."""
    (asked,) = pending(store.archive)
    run = store.archive
    assert run is not None
    if point == "asked":
        return
    assert asked.claim()
    if point == "begun":
        return
    store.pin(1)
    if point != "done":
        asked.answer({"done": "pinned"})
        if point == "answered":
            (run / "requests" / f"{asked.name}.doing").touch()


@pytest.mark.parametrize("point", ["asked", "begun", "done", "answered", "cleared"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_holder_killed_at_any_point_has_done_it_once_or_not_and_never_twice(
    store: AdapterStore, shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, opened: bool
) -> None:
    """Killed between two looks of a client, and the run `opened` again by then, or not."""
    run, done = tmp_path / "run", []

    def act(store: AdapterStore) -> dict[str, Any]:
        done.append("by the client")
        return {"done": "by the client"}

    monkeypatch.setitem(change.__globals__, "POLL_S", 1.0)
    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(change, run, "pin", act, timeout_s=60, version=1)
        until(lambda: bool(pending(store.archive)))
        time.sleep(0.2)
        begin_and_die(store, point)
        die(store)
        with AdapterStore(shm_dir, run) if opened else nullcontext() as again:
            if again is not None:
                assert pending(again.archive) == [], "nobody does what another holder was asked"
                if point == "asked":
                    until(lambda: bool(pending(again.archive)))
                    done += apply(again)
            if point in ("begun", "done"):
                with pytest.raises(
                    StoreError, match=r"ended while it was doing this; `lora-grpo versions .*run` shows"
                ):
                    asking.result(60)
            else:
                assert asking.result(60)["done"] == ("by the client" if point == "asked" and not opened else "pinned")
    expected = ["asked from outside: pin 1: pinned"] if opened else ["by the client"]
    assert done == (expected if point == "asked" else [])
    with AdapterStore(shm_dir, run) as last:
        assert pending(last.archive) == []
        assert last.pins == (set() if point == "begun" or (point == "asked" and not opened) else {1})
        left = files(run)
    # Whose client has gone is still answered, where it lay half done.
    assert len(left) == (not opened and point in ("begun", "done", "answered"))
    assert all(name.endswith(".answer") for name in left)


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_takes_a_request_back_or_says_that_it_cannot(store: AdapterStore, tmp_path: Path, begun: bool) -> None:
    run = tmp_path / "run"
    client = subprocess.Popen(
        [sys.executable, "-m", "lora_grpo", "rollback", str(run), "--to", "parent"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert client.stderr is not None
    assert client.stderr.readline().startswith("asked process ")
    until(lambda: bool(pending(store.archive)))
    if begun:
        assert pending(store.archive)[0].claim()
    time.sleep(0.2)
    client.send_signal(signal.SIGINT)
    said = client.stderr.read()
    assert client.wait(60) == 130
    assert pending(store.archive) == []
    assert ("nothing has changed" in said) is not begun
    assert ("too late" in said) is begun
