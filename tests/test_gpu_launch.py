"""How benchmarks/gpu/run.py starts its steps: forks of a process that has imported all, and what is left of one that is
ended at its limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lora_grpo.bench import host
from tests.test_gpu_script import CARD, REPOSITORY, call, plan_of, record, run, scripts, states

__all__ = ["run", "scripts"]

IMPORTS = {
    "lora_grpo/__init__.py": "",
    "lora_grpo/errors.py": "class LoraGrpoError(Exception): pass",
    "lora_grpo/bench/__init__.py": "",
    "lora_grpo/bench/process.py": "",
    "lora_grpo/engines/__init__.py": "",
    "lora_grpo/engines/compat.py": """
import os, sys, time, types

def import_vllm():
    time.sleep(float(os.environ.get("SLOW", "0")))
    bad = os.environ.get("BAD") == "1"
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(_is_in_bad_fork=lambda: bad))
""",
    "step.py": """
import json, os, sys
print(json.dumps({
    "forked": "lora_grpo.engines.compat" in sys.modules, "words": sys.argv[1:],
    "own session": os.getsid(0) == os.getpid(), "main": __name__,
}), flush=True)
if "wait" in sys.argv:
    import time
    time.sleep(60)
sys.exit(3)
""",
}
"""In place of what takes ten seconds to import; what else a launcher imports is missing, which it lives through."""


class Started:
    """Starts `step.py` as a launcher does, and reads what it says."""

    def __init__(self, launcher: Any, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder

    def __call__(self, *words: str, warm: bool = True) -> tuple[Any, Path]:
        output = self.folder / "out"
        with open(output, "w") as stdout:
            return self.launcher.start([sys.executable, *words], warm=warm, stdout=stdout.fileno()), output

    def seen(self, *words: str, warm: bool = True) -> dict[str, Any]:
        process, output = self(*words, warm=warm)
        assert process.wait(30.0) == 3, (self.folder / "log").read_text()
        assert 0 < process.cpu_s < 10
        found: dict[str, Any] = json.loads(output.read_text())
        return found


@pytest.fixture
def started(
    scripts: SimpleNamespace,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Started]:
    for name, text in IMPORTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), **getattr(request, "param", {})}
    launcher = scripts.launching.Launcher(environ, tmp_path / "log")
    yield Started(launcher, tmp_path)
    launcher.close()


def test_steps_are_forks_of_what_has_imported_all(started: Started) -> None:
    """A script and a module, as Python itself would run them; what asks for it is a fresh Python."""
    script = str(started.folder / "step.py")
    expected = {"forked": True, "words": ["a"], "own session": True, "main": "__main__"}
    assert started.seen(script, "a") == expected
    assert started.seen("-m", "step", "a") == expected
    assert started.seen(script, "a", warm=False) == {**expected, "forked": False}
    started.launcher.forks = False
    assert started.seen(script, "a") == {**expected, "forked": False}


@pytest.mark.parametrize("started", [{"BAD": "1"}], indirect=True)
def test_where_cuda_has_started_too_early_it_is_a_fresh_python(started: Started) -> None:
    assert not started.seen(str(started.folder / "step.py"))["forked"]


def test_a_fork_is_ended_like_any_other_process(started: Started) -> None:
    process, output = started(str(started.folder / "step.py"), "wait")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.0)
    while not output.read_text():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.send(signal.SIGTERM)
    assert process.wait(10.0) == -signal.SIGTERM


@pytest.mark.parametrize("started", [{"SLOW": "60"}], indirect=True)
def test_imports_that_do_not_end_are_ended(started: Started) -> None:
    """With the process that imports; the next step has a new one."""
    process, _ = started(str(started.folder / "step.py"))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send(signal.SIGTERM)
    assert process.wait(10.0) == 1
    assert not started.seen(str(started.folder / "step.py"), warm=False)["forked"]


def test_a_card_that_fails_is_tried_without_forks(
    run: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is any other step one after that."""
    tries, forks = tmp_path / "tries", []
    noted = f"file = open({str(tries)!r}, 'a+'); file.write('x'); file.seek(0); assert file.read() == 'xx'"
    plan_of(run, monkeypatch, card=f"{noted}; {CARD}", demo="pass")
    step = run.run_step
    monkeypatch.setattr(run, "run_step", lambda *given: forks.append(given[3].forks) or step(*given))
    assert call(run, tmp_path) == 0
    assert (tries.read_text(), forks) == ("xx", [True, False, False])


def test_only_what_failed_before_is_a_fresh_python(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cut off goes on as it began: importing anew would cost it ten seconds more."""
    plan_of(run, monkeypatch, card=CARD, parity="pass", large="pass", demo="pass")
    (tmp_path / "steps").mkdir()
    for name, state in (("parity", "failed"), ("large", "cut off")):
        (tmp_path / "steps" / f"{name}.json").write_text(json.dumps({"state": state}))
    warm, step = {}, run.run_step
    monkeypatch.setattr(run, "run_step", lambda *given: warm.update({given[0].name: given[4]}) or step(*given))
    assert call(run, tmp_path) == 0
    assert warm == {"card": True, "parity": False, "large": True, "demo": True}


FIGURES = """
import sys, time
sys.path[:0] = [{scripts!r}, {repository!r}]
from lora_grpo.bench import runner, suite

class Worker:
    def __init__(self, log): pass
    def prepare(self, subject): pass
    def finish(self): return 0
    def close(self): pass
    def kill(self): pass
    def do(self, work, **arguments):
        if work.startswith("rollback"):
            print("in the middle", flush=True)
            time.sleep(60)
        return ANSWERS.get(work)

ANSWERS = {answers!r}
runner.WorkerProcess = suite.WorkerProcess = Worker
import figures
sys.argv = ["figures.py", "0.5b", "--shape", "tiny", "--device", "cpu", "--out", {out!r}, "--models", {models!r}]
figures.main()
"""
MEMORY = ("before", "trainer", "engine", "sync", "tmpfs", "peak", "reserved_peak", "copy", "weights")
ANSWERS: dict[str, Any] = {
    "host:look": {
        "memory_bytes": {"free": 64 << 30, "total": 64 << 30},
        "card": host.card("cpu"),
        "bandwidth": {"host_copy": 1e9},
    },
    "host:measure_model": {"parameters": 1000, "linear_elements": 900, "linear_inputs_and_outputs": 90},
    "host:build_model": "somewhere",
    "fidelity:oracle": {},
    "memory:measure": {**{f"{name}_bytes": 1 << 20 for name in MEMORY}, "kind": "pss", "kv_tokens": None},
    "sync:measure": {
        "phases_s": {"load": [0.02]},
        "afterwards_s": [0.0],
        "moved_bytes": {"host_copy": 100},
        "decodes_like": "native",
        "loader": None,
        "load_calls": None,
    },
}


def test_figures_that_are_ended_at_their_limit_keep_what_they_have(
    run: ModuleType,
    scripts: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of the first strategy: what it has measured is in the results, the report, and kept for the next
    call."""
    from steps import Step, _measured

    out, words = tmp_path / "out", {"scripts": str(REPOSITORY / "benchmarks" / "gpu"), "repository": str(REPOSITORY)}
    results = out / "bench" / "0.5b"
    code = FIGURES.format(**words, answers=ANSWERS, out=str(results), models=str(tmp_path / "models"))
    plan_of(run, monkeypatch, card=CARD)
    command = [sys.executable, "-c", code]
    figures = Step("0.5b", 1, 600, command, lambda _: _measured(results / "results.json"), "tiny", warm=False)
    planned = [*run.plan(), figures]
    monkeypatch.setattr(run, "plan", lambda *_: planned)
    waited, log = scripts.launching.Started.wait, out / "logs" / "0.5b.log"

    def until_the_middle(process: Any, timeout_s: float | None = None) -> int:
        while timeout_s == 600 and "in the middle" not in log.read_text():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return waited(process, 0.1)
        return waited(process, 0.0 if timeout_s == 600 else timeout_s)

    monkeypatch.setattr(scripts.launching.Started, "wait", until_the_middle)
    assert call(run, out, "--minutes", "20") == 1
    assert states(out) == {"card": "passed", "0.5b": "cut off"}
    found = record(out, "0.5b")
    assert (found["rc"], found["result"]["complete"]) == (130, False), found["tail"]
    assert (found["result"]["sync"], found["result"]["memory"], found["result"]["rollback"]) == (
        ["native"],
        ["native"],
        [],
    )
    kept = json.loads((results / "partial.json").read_text())["cells"]
    assert sorted(cell["table"] for cell in kept.values()) == ["memory", "sync"]
    assert "native" in (out / "report.md").read_text()
