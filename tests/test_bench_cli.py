"""`lora-grpo bench` from end to end, with real engines on the tiny shape."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_grpo.bench import host, shapes, suite
from lora_grpo.bench.plan import PARTS
from lora_grpo.bench.schema import Document
from lora_grpo.cli import app

pytestmark = pytest.mark.vllm

SCENARIO = """
[all]
shape = "tiny"
max_model_len = 64
max_num_seqs = 8
repeat = 2
strategies = ["native", "merge-trl", "merge-fold"]
rows = [2]
lengths = [4, 8]
least_s = 0.0
prompt_tokens = 8
step_rows = 4
step_tokens = 8

[sync]
sweep_ranks = []
sweep_targets = []

canary_rows = [2]

[memory]
strategies = ["native"]

[decode]
strategies = ["base", "native", "native-stock", "native-shared", "merge-trl", "merge-fold"]

[fidelity]
learning_rates = [1e-6]
updates = [1]
cycles = [1, 20]

[step]

[rollback]
strategies = ["native", "merge-fold"]

[endurance]
strategies = ["native"]
endurance_syncs = 40
"""
SLOW, STALE, BROKEN = (f"tests.bench_strategies:{name}" for name in ("Slow", "Stale", "Broken"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lora_grpo", "bench", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}


def last_line(stdout: str) -> Document:
    return Document.model_validate_json(stdout.rstrip("\n").rsplit("\n", 1)[-1])


def test_every_part_and_its_report(tmp_path: Path) -> None:
    scenario, out = tmp_path / "tiny.toml", tmp_path / "out"
    scenario.write_text(SCENARIO)
    done = subprocess.run(
        command("all", "--scenario", str(scenario), "--out", str(out)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = last_line(done.stdout)
    assert document.complete
    assert document.failures == []
    assert set(document.settings) == set(PARTS)
    assert done.stdout.index("floor") < done.stdout.index("Sync: until") < done.stdout.index("Rollback: back")

    sync = {row.strategy: row for row in document.sync}
    assert set(sync) == {"native", "merge-trl", "merge-fold"}
    for row in sync.values():
        assert row.syncs == 2
        assert sum(row.phases_s.values()) == pytest.approx(row.median_s, rel=0.5)
    assert sync["merge-trl"].moved_bytes > 4 * sync["native"].moved_bytes == 4 * sync["merge-fold"].moved_bytes
    assert all(row.passed and row.signal_nats > 10 * row.noise_nats for row in document.truth)

    (memory,) = document.memory
    assert memory.peak_bytes > memory.engine_bytes > memory.trainer_bytes > 0
    assert memory.tmpfs_bytes > sync["native"].moved_bytes

    assert [(row.proof, row.rows) for row in document.proof] == [("same base", None), ("probe", None), ("canary", 2)]
    assert all(row.median_s > 0 and row.ratio_to_push > 0 for row in document.proof)
    assert document.proof[1].median_s > document.proof[0].median_s

    decoded = {(row.strategy, row.rows, row.completion_tokens) for row in document.decode}
    variants = ("base", "native-stock", "native-shared")
    assert decoded == {(strategy, 2, length) for strategy in (*sync, *variants) for length in (4, 8)}
    assert {"native-stock", "native-shared"} < {row.strategy for row in document.truth}
    assert {row.strategy for row in document.break_even} == {"merge-trl", "merge-fold"}
    fidelity = {row.strategy: row for row in document.fidelity}
    assert fidelity["native"].lost_share < 0.02 < 0.9 < fidelity["merge-fold"].lost_share < 1.1
    drift = {(row.strategy, row.cycles): row for row in document.drift}
    assert drift["native", 20].max_abs == drift["merge-fold", 20].max_abs == 0
    assert drift["merge-trl", 20].mean_relative > drift["merge-trl", 1].mean_relative > 0
    assert all(row.generate_s > 0 and row.train_s > 0 for row in document.step)
    assert {(row.strategy, row.case) for row in document.rollback} == {
        ("native", "still loaded"),
        ("native", "evicted"),
        ("merge-fold", "merged again"),
    }
    assert all(row.error_nats == 0 for row in document.rollback if row.strategy == "native")

    assert [(row.first, row.last) for row in document.endurance] == [(4 * n + 1, 4 * n + 4) for n in range(10)]
    assert all(row.memory_bytes > 1e8 and row.tmpfs_bytes > sync["native"].moved_bytes for row in document.endurance)
    (slope,) = document.slopes
    assert slope.syncs == 40
    # Retention keeps tmpfs at a constant number of versions from the first tenth on.
    assert max(row.tmpfs_bytes for row in document.endurance) < 1.1 * document.endurance[0].tmpfs_bytes

    assert json.loads((out / "results.json").read_text()) == document.model_dump(mode="json")
    assert not (out / "partial.json").exists()
    report = (out / "report.md").read_text()
    for picture in ("sync-times", "sync-phases", "break-even", "memory", "fidelity", "drift", "endurance"):
        assert f"({picture}.png)" in report
        assert (out / f"{picture}.png").stat().st_size > 10_000
    assert "merge-trl wins" in report
    assert "## Where the milliseconds of a sync go: native, tiny" in report


def test_interrupted_then_resumed_and_a_stale_policy_fails(tmp_path: Path) -> None:
    """Ctrl-C keeps the pair that was measured; going on does not measure it again, and finds the stale one out."""
    arguments = command("sync", "--shape", "tiny", "--ranks", "4", "--repeat", "2", "--out", str(tmp_path / "out"))
    arguments += ["--strategies", f"native,{SLOW},{STALE}"]
    partial = tmp_path / "out" / "partial.json"
    running = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not (partial.exists() and f"sync/{SLOW}" in partial.read_text()):
        _wait(running)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr[-3000:]
    before = last_line(stdout)
    assert not before.complete
    slow = next(row for row in before.sync if row.strategy == SLOW)
    assert slow.median_s > 0.2
    assert slow.ratio_to_native > 2

    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=400)
    document = last_line(done.stdout)
    assert done.returncode == 1
    assert next(row for row in document.sync if row.strategy == SLOW) == slow
    (failure,) = document.failures
    assert failure.startswith(f"{STALE} serves another policy than it claims")
    assert failure in done.stderr
    assert {row.strategy: row.passed for row in document.truth} == {"native": True, SLOW: True, STALE: False}


class FakeWorker:
    """Knows the machine and makes no model; `interrupted` has Ctrl-C come while it would."""

    interrupted = False

    def __init__(self, log: Path, *, alone: bool = False) -> None: ...

    def close(self) -> None: ...

    def do(self, work: Any, **arguments: Any) -> Any:
        if work is shapes.write_model and self.interrupted:
            raise KeyboardInterrupt
        sizes = {"parameters": 1000, "linear_elements": 900, "linear_inputs_and_outputs": 90}
        memory = {"free": 64 << 30, "total": 64 << 30}
        seen = {"card": host.card("cpu"), "memory_bytes": memory, "bandwidth": {"host_copy": 1e9}}
        return {host.look: seen, host.measure_model: sizes, shapes.write_model: "somewhere"}[work]


def test_a_finished_result_is_replaced_by_another_finished_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run in its folder is refused; the same one, interrupted, leaves result and report as they were."""
    out, mine = tmp_path / "out", f"native,{SLOW}"
    words = ["bench", "rollback", "--shape", "tiny", "--ranks", "4", "--out", str(out), "--strategies"]
    monkeypatch.setattr(suite, "WorkerProcess", FakeWorker)
    monkeypatch.setitem(suite.CELLS, "rollback", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["lora-grpo", *words, mine])

    def run(strategies: str) -> Any:
        return CliRunner().invoke(app, [*words, strategies], catch_exceptions=False)

    first = run(mine)
    assert first.exit_code == 0
    assert "measured again" not in first.stderr
    finished = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "results.json" in finished
    refused = run("native,merge-fold")
    assert refused.exit_code == 2
    assert f"{out} holds the finished result of another run (lora-grpo bench rollback" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == finished

    monkeypatch.setattr(FakeWorker, "interrupted", True)
    assert run(mine).exit_code == 130
    assert {name: (out / name).read_bytes() for name in finished} == finished
    monkeypatch.setattr(FakeWorker, "interrupted", False)
    again = run(mine)
    assert again.exit_code == 0
    assert f"{out} holds this run's finished result: it is measured again" in again.stderr
    assert not (out / "partial.json").exists()
    assert (out / "results.json").read_bytes() != finished["results.json"]


def test_a_strategy_that_breaks_fails_its_cells_and_no_other(tmp_path: Path) -> None:
    """Its worker dies with the traceback in its log; what others measured stays, and another start goes on."""
    out = tmp_path / "out"
    arguments = command("step", "--shape", "tiny", "--ranks", "4", "--repeat", "2", "--out", str(out))
    arguments += ["--strategies", f"native,{BROKEN},merge-fold"]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr[-3000:]
    document = last_line(done.stdout)
    (failure,) = document.failures
    assert failure.startswith(f"step/{BROKEN}/r4/all-linear failed: a worker died with exit code 1")
    assert "RuntimeError: the seventh layer is missing" in failure
    assert {row.strategy for row in document.step} == {"native", "merge-fold"}
    assert "Traceback" in (out / "workers.log").read_text()
    assert (out / "partial.json").exists()


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sync", "--shape", "qwen2.5-05b"], "did you mean 'qwen2.5-0.5b'?"),
        (["sync", "--shape", "tiny", "--strategies", "merge-tlr"], "did you mean 'merge-trl'?"),
        (["snyc"], "did you mean 'sync'?"),
        (["sync", "--shape", "tiny", "--device", "cuda:63"], "there is no device 'cuda:63' here"),
        (["sync", "--shape", "tiny", "--device", "gpu"], "device 'gpu' is none"),
        (["memory", "--model", "./nowhere"], "model './nowhere': there is no directory"),
        (["report"], "give its directory with --out"),
    ],
)
def test_one_sentence_before_anything_starts(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(*arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_keeps_what_was_measured_and_leaves_no_model_behind(tmp_path: Path) -> None:
    """`timeout` sends SIGTERM; a model of gigabytes on tmpfs would stay in memory for good."""
    before = _models()
    running = subprocess.Popen(
        command("memory", "--shape", "tiny", "--out", str(tmp_path)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while running.poll() is None and not _models() - before:
        _wait(running)
    mine = _models() - before
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr[-3000:]
    assert not last_line(stdout).complete
    assert mine
    assert not mine & _models()


def _models() -> set[Path]:
    return set(Path("/dev/shm").glob("lora-grpo-bench-*/models/tiny-seed0/config.json"))
