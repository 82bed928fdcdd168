"""Strategies in turn in one process: their order, what one may leave behind, and what rows of unpaired medians say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from typer.testing import CliRunner

from lora_grpo.bench import runner, suite, sync
from lora_grpo.bench.plan import AGAIN, AT_ONCE, Cell, compared, one_at_a_time, plan_parts
from lora_grpo.bench.report import findings, write_report
from lora_grpo.bench.runner import Partial, Runner, load
from lora_grpo.bench.strategy import engine_arguments
from lora_grpo.cli import app
from lora_grpo.engines import compat
from lora_grpo.engines.local.weights import PlainEngine
from lora_grpo.errors import EngineError
from tests.test_bench import decode_row, document, subject, sync_row

STRATEGIES = ("native", "merge-trl", "merge-fold")


def planned(**changes: Any) -> list[Cell]:
    """Memory, sync and decode, as a GPU has them."""
    common = {"shape": "tiny", "device": "cuda:0", "canary_rows": (), "sweep_ranks": (), "sweep_targets": (), **changes}
    cells = []
    for part, names in (("sync", STRATEGIES), ("memory", STRATEGIES), ("decode", ("native", "merge-trl", "base"))):
        settings = plan_parts(part, None, {**common, "strategies": names})[part]
        cells += suite.CELLS[part](settings, subject(device="cuda:0"))
    return one_at_a_time(cells)


def test_each_strategy_has_one_engine_and_native_is_first_and_last() -> None:
    """Memory, which lets go of its weights, comes last on it."""
    cells = planned()
    turns = list(dict.fromkeys(cell.subjects[0].strategy for cell in cells))
    assert turns == ["native", "merge-trl", "merge-fold", "base", AGAIN]
    by_turn = {turn: [c.table for c in cells if c.subjects[0].strategy == turn] for turn in turns}
    assert by_turn["native"] == ["sync", "decode", "truth", "memory"]
    assert by_turn["merge-trl"] == ["sync", "sync", "decode", "truth", "memory"]
    assert by_turn["merge-fold"] == ["sync", "truth", "memory"]
    assert by_turn["base"] == ["decode"]
    assert by_turn[AGAIN] == ["sync", "decode", "memory"]
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(len(cell.subjects) == 1 and not cell.fresh for cell in cells)
    assert [cell.order for cell in cells if cell.table == "sync"] == [(0, 0)] * 5


def done(strategy: str, seconds: float, calls: int | None = None) -> dict[str, Any]:
    result = {
        "phases_s": {"push": [seconds]},
        "afterwards_s": [0.0],
        "moved_bytes": {"device_copy": 100},
        "loader": None,
        "load_calls": calls,
    }
    return {"strategy": strategy, "result": result}


def synced(*rounds: dict[str, Any]) -> dict[str, Any]:
    labels = {"shape": "tiny", "rank": 16, "targets": "all-linear", "engine": "eager"}
    return {"table": "sync", "labels": labels, "rounds": list(rounds), "bandwidth": {"device_copy": 100.0}}


def test_rows_compare_with_natives_first_turn() -> None:
    cells = {
        "sync/native": synced(done("native", 1.0), done("native", 3.0)),
        "sync/trl": synced(done("merge-trl", 8.0, 339)),
        "sync/native/again": synced(done(AGAIN, 2.2)),
    }
    rows = {row.strategy: row for cell in compared(cells) for row in sync.sync_rows(cell)}
    assert {name: row.ratio_to_native for name, row in rows.items()} == {"native": 1.0, "merge-trl": 4.0, AGAIN: 1.1}
    assert {row.against for row in rows.values()} == {"unpaired"}
    assert rows["merge-trl"].load_calls == 339
    del cells["sync/native"]
    left = {row.strategy: row for cell in compared(cells) for row in sync.sync_rows(cell)}
    assert left["merge-trl"].ratio_to_native == pytest.approx(8.0 / 2.2)


class FakeWorker:
    """Cannot start the strategies in `broken`."""

    made: list[FakeWorker]
    broken: tuple[str, ...] = ()

    def __init__(self, log: Path, *, alone: bool = False) -> None:
        self.alone, self.done = alone, list[str]()
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.made.append(self)

    def load(self, subject: Any) -> None:
        assert all(worker.done[-1:] == ["closed"] for worker in self.made[:-1]), "two strategies are alive at once"
        if subject.strategy in self.broken:
            raise EngineError("no kernel image")
        self.done.append(subject.strategy)

    def do(self, work: Any, **arguments: Any) -> None:
        if work is load:
            self.load(**arguments)
        self.asked.append((work, arguments))

    def close(self) -> None:
        self.done.append("closed")


def in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **faults: Any) -> tuple[Partial, list[str]]:
    monkeypatch.setattr(FakeWorker, "made", [], raising=False)
    for name, value in faults.items():
        monkeypatch.setattr(FakeWorker, name, value)
    monkeypatch.setattr(runner, "WorkerProcess", FakeWorker)
    partial = Partial(tmp_path / "partial.json", {}, {}, 0.0)
    return partial, Runner(tmp_path / "log", lambda *_: None, alive_at_once=1).run(planned(), partial)


def test_one_strategy_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    partial, failures = in_turns(monkeypatch, tmp_path)
    names = ("native", "merge-trl", "merge-fold", "base", AGAIN)
    assert [worker.done for worker in FakeWorker.made] == [[name, "closed"] for name in names]
    assert failures == []
    assert set(partial.cells) == {cell.key for cell in planned()}
    syncs = [arguments for work, arguments in FakeWorker.made[1].asked if work is sync.measure]
    assert [arguments.get("at_once", False) for arguments in syncs[-2:]] == [True, True]
    assert not any(arguments.get("at_once") for arguments in syncs[:-2])


@pytest.mark.parametrize(
    ("device", "fresh", "alone"), [("cpu", False, False), ("cpu", True, True), ("cuda:0", False, True)]
)
def test_who_imports_by_itself(
    device: str, fresh: bool, alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CUDA cannot be started in a fork of what has started it, as importing may; measured memory is one's own."""
    monkeypatch.setattr(FakeWorker, "made", [], raising=False)
    monkeypatch.setattr(runner, "WorkerProcess", FakeWorker)
    cell = Cell("sync/native", "sync", sync.measure, (subject(device=device),), fresh=fresh)
    Runner(tmp_path / "log", lambda *_: None, alive_at_once=1).run(
        [cell], Partial(tmp_path / "partial.json", {}, {}, 0.0)
    )
    assert [worker.alone for worker in FakeWorker.made] == [alone]


def test_a_strategy_that_does_not_start_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each try takes half a minute of a GPU; all of its cells fail, and no other's."""
    _, failures = in_turns(monkeypatch, tmp_path, broken=("merge-fold",))
    started = [worker.done for worker in FakeWorker.made]
    assert started == [["native", "closed"], ["merge-trl", "closed"], ["closed"], ["base", "closed"], [AGAIN, "closed"]]
    assert len(failures) == 3
    assert "no kernel image" in failures[0]
    assert all("has not started before" in failure for failure in failures[1:])


def test_graphs_alone_are_captured_for_the_rows_that_are_measured() -> None:
    made = engine_arguments(subject(device="cuda:0", graphs="alone", rows=(64, 1), kv_cache_memory_bytes=5))
    assert made["compilation_config"] == {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 64],
    }
    assert (made["enforce_eager"], made["kv_cache_memory_bytes"]) == (False, 5)
    eager = engine_arguments(subject(graphs="alone"))
    assert eager["enforce_eager"]
    assert "compilation_config" not in eager
    engines = [
        plan_parts("sync", None, {"device": "cuda:0", "graphs": g})["sync"].engine for g in (False, "alone", True)
    ]
    assert engines == ["eager", "graphs alone", "compiled"]


@pytest.mark.parametrize(("at_once", "calls"), [(False, 3), (True, 1)])
def test_calls_of_load_weights_are_counted(monkeypatch: pytest.MonkeyPatch, at_once: bool, calls: int) -> None:
    """One by one as TRL pushes them, or all in one."""
    seen: list[list[str]] = []
    model = SimpleNamespace(load_weights=lambda named: seen.append([name for name, _ in named]))
    monkeypatch.setattr(compat, "is_cpu", lambda: False)
    monkeypatch.setattr(compat, "runner", lambda llm: SimpleNamespace(get_model=lambda: model))
    engine = PlainEngine.__new__(PlainEngine)
    engine._llm = None
    named = ((name, torch.zeros(1)) for name in "abc")
    assert engine.load_weights(named, at_once=at_once) == len(seen) == calls
    assert [name for names in seen for name in names] == ["a", "b", "c"]


def test_the_report_says_what_is_not_paired_and_has_pictures_of_each_shape(tmp_path: Path) -> None:
    turns = {"against": "unpaired", "engine": "graphs alone"}
    rows = [
        sync_row("native", 0.1, 0.1, **turns),
        sync_row("merge-trl", 0.5, 0.1, load_calls=339, **turns),
        sync_row(AT_ONCE, 0.4, 0.1, load_calls=1, **turns),
        sync_row(AGAIN, 0.11, 0.1, **turns),
    ]
    large = [row.model_copy(update={"shape": "qwen2.5-7b"}) for row in rows]
    made = document([*rows, *large], [decode_row("native", 0.01, 0.01), decode_row("merge-trl", 0.008, 0.01)])
    made.notes = ["x began in a fresh process: 1.0 GiB stayed taken."]
    step = {"step": "7b", "state": "passed", "seconds": 240.0}
    (tmp_path / "summary.json").write_text(json.dumps({"steps": [step], "notes": ["Models were in /tmp."]}))
    said = findings(made)
    for line, shape in zip(said, ("tiny", "qwen2.5-7b"), strict=False):
        figures = f"native 100 ms, merge-trl 500 ms (5), {AT_ONCE} 400 ms (4), {AGAIN} 110 ms (1.1)."
        assert line == f"- Sync, {shape}, r=16 all-linear: {figures}"
    text = write_report(made, tmp_path).read_text()
    assert "- Models were in /tmp.\n- x began in a fresh process" in text
    assert "| step | state | seconds |" in text
    for words in ("graphs alone", "| unpaired |", "| 339 |"):
        assert words in text
    assert {path.stem for path in tmp_path.glob("sync-*.png")} == {
        f"sync-{kind}-{shape}" for kind in ("times", "phases") for shape in ("tiny", "qwen2.5-7b")
    }


def test_ctrl_c_while_its_first_worker_starts_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "_fastest_folder", lambda: tmp_path)
    monkeypatch.setattr(suite, "WorkerProcess", Mock(side_effect=KeyboardInterrupt))
    said = CliRunner().invoke(app, ["bench", "sync", "--shape", "tiny"]).stderr
    assert "looking at this machine\nstopped before anything was measured\n" in said
    assert list(tmp_path.iterdir()) == []
