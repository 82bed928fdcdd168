"""How benchmarks/gpu/run.py starts its steps: forks of a process that has imported all, and what is left of one that is
ended at its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lora_grpo.bench import host
from tests.test_gpu_script import CARD, REPOSITORY, SCRIPTS, call, plan_of, record, run, scripts, states, strategies

__all__ = ["run", "scripts"]

IMPORTED = """
import os, sys, types
assert os.environ.get("FAILS") != "1"
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(_is_in_bad_fork=lambda: "BAD" in os.environ))
"""
"""In place of what takes ten seconds to import."""
STEP = """
import json, os, sys, time
found = {"forked": "torch" in sys.modules, "words": sys.argv[1:], "leads": os.getsid(0) == os.getpid()}
print(json.dumps({**found, "main": __name__}), flush=True)
time.sleep(60 if "wait" in sys.argv else 0)
sys.exit(3)
"""
STARTING = """
import json, signal, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
from run import send, start, wait

OUT = Path("out").resolve()

def main():
    for words, warm in json.loads(sys.argv[1]):
        process = start([sys.executable, *words], OUT, warm=warm)
        while "wait" in words and not OUT.read_text():
            wait(process, 0.05)
        if "wait" in words:
            send(process, signal.SIGTERM)
        print(json.dumps([wait(process, 30), json.loads(OUT.read_text())]), flush=True)

if __name__ == "__main__":
    main()
"""


def started(folder: Path, *steps: tuple[list[str], bool], **environ: str) -> list[tuple[int, dict[str, Any]]]:
    """Exit codes of `step.py`, started by a program of its own, and what it printed."""
    (folder / "lora_grpo" / "bench").mkdir(parents=True)
    (folder / "lora_grpo" / "bench" / "imported.py").write_text(IMPORTED)
    (folder / "step.py").write_text(STEP)
    (folder / "starting.py").write_text(STARTING.format(scripts=str(SCRIPTS)))
    command = [sys.executable, "starting.py", json.dumps(steps)]
    environment = {**os.environ, "PYTHONPATH": str(folder), **environ}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_steps_are_forks_of_what_has_imported_all(tmp_path: Path) -> None:
    """A script and a module, as Python itself would run them; what asks for it is a fresh Python; all end alike."""
    script, seen = str(tmp_path / "step.py"), {"words": ["a"], "leads": True, "main": "__main__"}
    steps = [([script, "a"], True), (["-m", "step", "a"], True), ([script, "a"], False), ([script, "wait"], True)]
    *ended, stopped = started(tmp_path, *steps)
    assert ended == [(3, {"forked": forked, **seen}) for forked in (True, True, False)]
    assert stopped == (-15, {"forked": True, **seen, "words": ["wait"]})


@pytest.mark.parametrize("environ", [{"BAD": "1"}, {"FAILS": "1"}], ids=["CUDA has started", "imports fail"])
def test_what_cannot_be_a_fork_is_a_fresh_python(tmp_path: Path, environ: dict[str, str]) -> None:
    ((code, seen),) = started(tmp_path, ([str(tmp_path / "step.py")], True), **environ)
    assert (code, seen["forked"]) == (3, False)


def test_a_card_that_fails_is_tried_without_forks(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is any other step one after that."""
    tries, forks = tmp_path / "tries", []
    noted = f"file = open({str(tries)!r}, 'a+'); file.write('x'); file.seek(0); assert file.read() == 'xx'"
    plan_of(run, monkeypatch, warm=True, card=f"{noted}; {CARD}", demo="pass")
    step = run.run_step
    monkeypatch.setattr(run, "run_step", lambda *given: forks.append(given[3]) or step(*given[:3], False))
    assert call(run, tmp_path) == 0
    assert (tries.read_text(), forks) == ("xx", [True, False, False])


def test_only_what_failed_before_is_a_fresh_python(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cut off goes on as it began: importing anew would cost it ten seconds more."""
    plan_of(run, monkeypatch, warm=True, card=CARD, parity="pass", large="pass", demo="pass")
    (tmp_path / "steps").mkdir()
    for name, state in (("parity", "failed"), ("large", "cut off")):
        (tmp_path / "steps" / f"{name}.json").write_text(json.dumps({"state": state}))
    warm, step = {}, run.run_step
    monkeypatch.setattr(
        run, "run_step", lambda *given: warm.update({given[0].name: given[3]}) or step(*given[:3], False)
    )
    assert call(run, tmp_path) == 0
    assert warm == {"card": True, "parity": False, "large": True, "demo": True}


FIGURES = """
import sys, time
sys.path.insert(0, {repository!r})
from lora_grpo.bench import runner, suite
from lora_grpo.cli import main

class Worker:
    def __init__(self, log, alone=False): pass
    def close(self): pass
    def kill(self): pass
    def do(self, work, **arguments):
        name = work.__module__.removeprefix("lora_grpo.bench.") + ":" + work.__name__
        if name == "sync:go_back":
            print("in the middle", flush=True)
            time.sleep(60)
        return ANSWERS.get(name)

ANSWERS = {answers!r}
runner.WorkerProcess = suite.WorkerProcess = Worker
sys.argv = ["lora-grpo", *{words!r}]
main()
"""
ANSWERS: dict[str, Any] = {
    "host:look": {
        "memory_bytes": {"free": 64 << 30, "total": 64 << 30},
        "card": host.card("cpu"),
        "bandwidth": {"host_copy": 1e9},
    },
    "host:measure_model": {"parameters": 1000, "linear_elements": 900, "linear_inputs_and_outputs": 90},
    "shapes:write_model": "somewhere",
    "fidelity:oracle": {},
    "sync:measure": {
        "phases_s": {"load": [0.02]},
        "afterwards_s": [0.0],
        "moved_bytes": {"host_copy": 100},
        "loader": None,
        "load_calls": None,
    },
}


def test_figures_that_are_ended_at_their_limit_keep_what_they_have(
    run: ModuleType, scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the first strategy: what it has measured is in the results, the report, and kept for the next
    call."""
    out, models = tmp_path / "out", tmp_path / "models"
    (planned,) = [step for step in scripts.steps.plan(out, "cpu", models) if step.name == "0.5b"]
    words = planned.command[3:]
    code = FIGURES.format(repository=str(REPOSITORY), answers=ANSWERS, words=words)
    plan_of(run, monkeypatch, card=CARD)
    figures = replace(planned, command=[sys.executable, "-c", code], limit_s=600, warm=False)
    steps = [*run.plan(), figures]
    monkeypatch.setattr(run, "plan", lambda *_: steps)
    log, wait = out / "logs" / "0.5b.log", run.wait

    def until_the_middle(process: Any, timeout_s: float | None = None) -> int | None:
        ends = (timeout_s or 0) < 500
        while not ends and "in the middle" not in log.read_text():
            ends = wait(process, 0.1) is not None
        return wait(process, timeout_s if ends else 0.0)

    monkeypatch.setattr(run, "wait", until_the_middle)
    assert call(run, out, "--minutes", "20") == 1
    assert states(out) == {"card": "passed", "0.5b": "cut off"}
    found = record(out, "0.5b")
    assert (found["rc"], found["result"]["complete"]) == (130, False), found["tail"]
    seen = [strategies(found["result"][table]) for table in ("sync", "memory", "rollback")]
    assert seen == [{"native"}, set(), set()]
    kept = json.loads((out / "bench" / "0.5b" / "partial.json").read_text())["cells"]
    assert [cell["table"] for cell in kept.values()] == ["sync"]
    assert "native" in (out / "report.md").read_text()
