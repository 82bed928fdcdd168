"""benchmarks/gpu/run.py without a GPU: the dry run of its whole schedule, and what it does when a step fails or time is
over."""

from __future__ import annotations

import getpass
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from lora_grpo.bench import host
from lora_grpo.bench.plan import plan_parts
from lora_grpo.bench.schema import Document
from lora_grpo.engines import compat
from lora_grpo.errors import ConfigError, UnsupportedVersion
from tests.test_parity import ARCHITECTURES

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
MODULES = ("run", "steps")
STEPS = ["card", "tiny", "7b", "demo", "7b-compiled", "trainer", "trainer-7b", "population", "families", "experts"]
STEPS += ["rates", "0.5b", "parity", "invariance", "graphs"]
REPEATED = ("trainer-7b", "parity", "7b-compiled", "families", "experts", "rates")
DRY = [name for name in STEPS if name not in REPEATED]
START_S = 90
"""Of a host with a GPU."""
GIB = 1 << 30


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script, with models in a folder of this test."""
    monkeypatch.setattr(scripts.run, "SHARED", tmp_path / "shm")
    monkeypatch.setattr(scripts.run, "SLOWER", 1)
    module: ModuleType = scripts.run
    with patch.dict(os.environ):
        yield module


CARD = "print('{\"card\": {}}')"


def plan_of(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, limit_s: int = 60, warm: bool = False, **codes: str
) -> None:
    """Have the script run these programs instead of its steps."""
    from steps import Step

    steps = [Step(name, 1, limit_s, [sys.executable, "-c", code], warm=warm) for name, code in codes.items()]
    monkeypatch.setattr(run, "plan", lambda *_: steps)


def states(out: Path) -> dict[str, str]:
    return {row["step"]: row["state"] for row in json.loads((out / "summary.json").read_text())["steps"]}


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "steps" / f"{name}.json").read_text())


def call(run: ModuleType, out: Path, *more: str) -> int:
    return run.main(["--out", str(out), "--device", "cpu", *more])


@pytest.mark.timeout(1500)
@pytest.mark.vllm
def test_the_dry_run_of_the_whole_schedule(tmp_path: Path) -> None:
    """As on a GPU, but with tiny models and a few tests of a suite: each kind of step, the report and the archive.

    What would do the same here as a step before it is not in the dry run: see `test_the_plan_on_a_gpu`.
    """
    out, models = tmp_path / "out", tmp_path / "models"
    script = [sys.executable, str(SCRIPTS / "run.py"), "--out", str(out), "--models", str(models)]
    # Caches that other tests have filled, so that nothing is compiled again.
    inductor = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    caches = {"VLLM_CACHE_ROOT": str(Path.home() / ".cache" / "vllm"), "TORCHINDUCTOR_CACHE_DIR": inductor}
    environment = {**caches, **os.environ}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*script, "--device", "cpu", "--minutes", "20"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, (
        done.stdout,
        done.stderr,
        [path.read_text()[-1500:] for path in out.glob("logs/*.log")],
    )
    assert states(out) == dict.fromkeys(DRY, "passed")
    found = {name: record(out, name) for name in DRY}
    assert all(step["rc"] == 0 and step["seconds"] > 0 and step["tail"] for step in found.values())
    results = {name: step["result"] for name, step in found.items()}
    assert results["card"]["vllm"]["known_by"] == "run"
    # There is nothing to sleep on a CPU.
    for name, not_passed in (("tiny", set()), ("graphs", {"skipped"})):
        cases = [*xml.etree.ElementTree.parse(out / "logs" / f"{name}.xml").iter("testcase")]
        assert len(cases) > 0
        assert {child.tag for case in cases for child in case} - {"properties"} == not_passed
    for name in ("trainer", "population"):
        assert json.loads((out / "programs" / f"{name}.json").read_text())["command"]
    for name in ("0.5b", "7b"):
        assert results[name]["complete"]
        assert results[name]["failures"] == results[name]["notes"] == []
    merges = ["merge-fold", "merge-trl", "merge-trl-batched", "native", "native again"]
    assert strategies(results["0.5b"]["sync"]) == {*merges}
    assert strategies(results["7b"]["sync"]) == {*merges, "native-shared"}
    assert strategies(results["7b"]["decode"]) == {"base", "merge-trl", "native", "native again"}
    assert results["invariance"]["batch_invariant"] is False
    assert all(0 <= results["invariance"][key] <= 1 for key in ("with_adapter", "without_adapter"))
    assert results["demo"]["versions"] == results["demo"]["steps"] + 1
    assert not models.exists()
    check_report(out)
    with tarfile.open(out / "results.tar.gz") as archive:
        names = set(archive.getnames())
    expected = {"summary.json", "results.json", "report.md", "logs/7b.log", "steps/7b.json", "bench/7b/results.json"}
    assert expected <= names
    assert not any(name.endswith(".safetensors") for name in names)


def strategies(rows: list[dict[str, Any]]) -> set[str]:
    return {row["strategy"] for row in rows}


def check_report(out: Path) -> None:
    """One document of all figures, with the schedule, tables and pictures of both models."""
    document = Document.model_validate_json((out / "results.json").read_text())
    shared = next(row for row in document.truth if row.strategy == "native-shared")
    assert shared.same_bits
    assert all(row.passed for row in document.truth)
    assert {row.engine for row in document.decode} == {"eager"}
    assert all(row.before_bytes for row in document.memory)
    copies = {row.strategy: row.copies for row in document.memory if row.shape == "tiny"}
    assert copies["native-shared"] < 1.2 < copies["native"] < copies["merge-fold"]
    text = (out / "report.md").read_text()
    assert "## Steps of the run" in text
    assert "| unpaired |" in text
    assert "native again" in text
    for picture in ("sync-times-tiny-tied", "sync-times-tiny", "memory-tiny-tied", "memory-tiny", "break-even"):
        assert f"({picture}.png)" in text
        assert (out / f"{picture}.png").stat().st_size > 10_000


def test_the_plan_on_a_gpu(scripts: SimpleNamespace, tmp_path: Path) -> None:
    """Most valuable first, each within its limit. Of fifteen minutes what comes last gets what is left; both models are
    of released shapes."""
    planned = scripts.steps.plan(tmp_path, "cuda:0", tmp_path)
    assert [step.name for step in planned] == STEPS
    assert [step.name for step in scripts.steps.plan(tmp_path, "cpu", tmp_path)] == DRY
    assert all(1.3 * step.expected_s < step.limit_s for step in planned)
    until = {step.name: sum(one.expected_s for one in planned[: i + 1]) for i, step in enumerate(planned)}
    assert until["7b"] <= 9 * 60
    assert until["population"] <= 15 * 60 - START_S
    assert [step.name for step in planned if not step.warm] == ["invariance"]
    shapes = {step.name: step.shape for step in planned if step.shape}
    assert shapes == {"0.5b": "qwen2.5-0.5b", "7b": "qwen2.5-7b", "7b-compiled": "qwen2.5-7b"}
    options = {"shape": "qwen2.5-7b", "device": "cuda:0"}
    large = plan_parts("all", scripts.steps.scenario("7b", "cuda:0"), options)
    assert {settings.engine for settings in large.values()} == {"graphs alone"}
    assert set(large) == {"sync", "memory", "rollback"}
    compiled = plan_parts("all", scripts.steps.scenario("7b-compiled", "cuda:0"), options)
    assert {settings.engine for settings in compiled.values()} == {"compiled"}


@pytest.mark.vllm
def test_every_test_of_a_suite_is_in_one_step(scripts: SimpleNamespace, tmp_path: Path) -> None:
    planned = {step.name: step for step in scripts.steps.plan(tmp_path, "cuda:0", tmp_path)}
    files = ("parity", "nan_hunt", "gpu_sleep", "direct_load", "gpu_experts")
    whole = [*(f"tests/test_{name}.py" for name in files), "-q", "--device", "cuda:0"]
    every, *parts = collected([whole, *(list(planned[name].command[3:]) for name in scripts.steps.SUITES)])
    tiny, experts, parity, graphs = parts
    assert sorted([*tiny, *experts, *parity, *graphs]) == sorted(every)
    assert all(any(f"[{name}" in test for test in every) for name in ARCHITECTURES)
    assert all("graphs" in test or "sleep" in test for test in graphs)
    assert not any("graphs" in test and "parity" in test for test in (*tiny, *parity))
    assert {test.split("::")[0] for test in tiny} == {
        f"tests/test_{name}.py" for name in ("parity", "nan_hunt", "direct_load")
    }


def collected(commands: list[list[str]]) -> list[list[str]]:
    """The tests that each pytest command would run, found in one process."""
    code = (
        "import json, sys, pytest\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    print('@@@@@')\n"
        "    assert pytest.main([*words, '--collect-only']) == 0\n"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    return [[line for line in part.splitlines() if "::" in line] for part in done.stdout.split("@@@@@\n")[1:]]


def test_a_suite_that_is_cut_off_leaves_what_it_has_done(tmp_path: Path) -> None:
    """As a time limit ends it: the tests that have finished are in the report."""
    (tmp_path / "tests").mkdir()
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_two.py").write_text(
        "import time, pathlib\n\ndef test_quick():\n    pass\n\n"
        "def test_long():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    report = tmp_path / "report.xml"
    words = ["tests/test_two.py", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *words, "--junitxml", str(report)]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    while running.poll() is None and not (tmp_path / "started").exists():
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    printed, _ = running.communicate(timeout=30)
    assert running.returncode == 2, printed
    assert 'name="test_quick"' in report.read_text()


def test_it_goes_on_past_a_failed_step(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each step is given, and what is kept of it at once, in the archive too."""
    names = ("HF_HUB_OFFLINE", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "PYTHONPATH")
    in_archive = f"import tarfile; tarfile.open({str(tmp_path / 'results.tar.gz')!r}).getmember('logs/parity.log')"
    plan_of(
        run,
        monkeypatch,
        card=CARD,
        parity="print('so far'); raise SystemExit(3)",
        sync=f"import os, json; print(json.dumps({{k: os.environ[k] for k in {names}}}))",
        archive=in_archive,
    )
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    for name in names[2:4]:
        monkeypatch.delenv(name, raising=False)
    assert call(run, tmp_path) == 1
    assert states(tmp_path) == {"card": "passed", "parity": "failed", "sync": "passed", "archive": "passed"}
    failed = record(tmp_path, "parity")
    assert (failed["rc"], failed["result"], failed["tail"]) == (3, None, ["so far"])
    seen = record(tmp_path, "sync")["result"]
    caches = tmp_path / "shm" / "lora-grpo-gpu" / "caches"
    assert (seen["HF_HUB_OFFLINE"], seen["VLLM_USE_FLASHINFER_SAMPLER"]) == ("1", "0")
    assert (seen["VLLM_CACHE_ROOT"], seen["TRITON_CACHE_DIR"]) == (str(caches / "vllm"), str(caches / "triton"))
    assert seen["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), "/tmp/site"]


def test_the_same_command_goes_on(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed is kept, what failed is run again; a choice leaves the rest alone; the models go with the last."""
    mark, starts, model = tmp_path / "mended", tmp_path / "starts", tmp_path / "shm" / "lora-grpo-gpu" / "tiny"
    noted = f"open({str(starts)!r}, 'a').write"
    fails_first = f"import os, sys; {noted}('b'); sys.exit(not os.path.exists({str(mark)!r}))"
    plan_of(run, monkeypatch, card=f"{noted}('a'); {CARD}", parity=fails_first, demo=f"{noted}('c')")
    model.mkdir(parents=True)
    assert call(run, tmp_path, "--only", "card,parity") == 1
    assert model.exists()
    mark.touch()
    assert call(run, tmp_path) == 0
    assert states(tmp_path) == {"card": "passed", "parity": "passed", "demo": "passed"}
    assert not model.exists()
    assert starts.read_text() == "abcb"
    with pytest.raises(SystemExit):
        call(run, tmp_path, "--only", "parrity")


def test_what_failed_waits_for_what_was_not_tried(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a suite that was cut off, which would begin anew; figures that were go on where they were."""
    starts = tmp_path / "starts"
    states = {"tiny": "failed", "parity": "cut off", "small": "failed", "large": "cut off", "demo": None}
    plan_of(run, monkeypatch, card=CARD, **{name: f"open({str(starts)!r}, 'a').write('{name} ')" for name in states})
    steps = [replace(step, shape="tiny" if step.name in ("small", "large") else None) for step in run.plan()]
    monkeypatch.setattr(run, "plan", lambda *_: steps)
    (tmp_path / "steps").mkdir()
    for name, state in states.items():
        if state:
            (tmp_path / "steps" / f"{name}.json").write_text(json.dumps({"state": state}))
    assert call(run, tmp_path) == 0
    assert starts.read_text().split() == ["large", "demo", "tiny", "parity", "small"]


def test_the_time_to_end_a_step_is_part_of_a_call(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls it with a limit of a little more gets the report and the archive too."""
    given: list[float] = []
    done = {"state": "failed", "seconds": 0.0, "result": None}
    plan_of(run, monkeypatch, limit_s=1000, card=CARD)
    monkeypatch.setattr(run, "run_step", lambda step, log, limit_s, *_: given.append(limit_s) or done)
    call(run, tmp_path, "--minutes", "8.5")
    assert 470 < given[0] <= 8.5 * 60 - run.GRACE_S


def test_without_a_card_nothing_is_started(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(run, monkeypatch, card="print('error: vLLM 0.25.1 is neither'); raise SystemExit(2)", demo="pass")
    assert call(run, tmp_path) == 1
    assert states(tmp_path) == {"card": "refused", "demo": "not started"}
    assert record(tmp_path, "card")["why"] == "vLLM 0.25.1 is neither"


def test_ctrl_c_is_written_down(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    plan_of(run, monkeypatch, card=CARD, parity=stops, demo="pass")
    assert call(run, tmp_path) == 1
    assert states(tmp_path) == {"card": "passed", "parity": "interrupted", "demo": "not started"}
    assert record(tmp_path, "parity")["rc"] == -signal.SIGTERM


def test_time_that_is_over(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is asked to end at its limit, which keeps what it has; when the call's time is over nothing is started."""
    keeps = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(130)); print('{\"kept\": 2}', flush=True); "
        "time.sleep(60)"
    )
    plan_of(run, monkeypatch, limit_s=4, card=CARD, parity=keeps, sync=keeps, demo="pass")
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    assert call(run, tmp_path, "--minutes", "0.12") == 1
    assert states(tmp_path) == {"card": "passed", "parity": "cut off", "sync": "cut off", "demo": "not started"}
    cut = record(tmp_path, "parity")
    assert (cut["rc"], cut["result"]) == (130, {"kept": 2})
    assert cut["seconds"] >= 4


def test_a_step_that_does_not_end_is_ended(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    plan_of(run, monkeypatch, limit_s=3, card=CARD, parity=deaf, demo="pass")
    monkeypatch.setattr(run, "LEAST_S", 0.2)
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    assert call(run, tmp_path) == 1
    assert states(tmp_path) == {"card": "passed", "parity": "cut off", "demo": "passed"}
    assert record(tmp_path, "parity")["rc"] == -signal.SIGKILL


def test_where_models_go(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory; where that has no room in the temporary folder, which is said; where neither has, 7B is refused."""
    places, free = scripts.run, {"shm": 20 * GIB, "tmp": 30 * GIB}
    monkeypatch.setattr(places, "SHARED", tmp_path / "shm")
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(places, "_free_bytes", lambda folder: free[folder.parent.name])
    assert places.choose_place(None, "cuda:0") == places.Place(tmp_path / "shm" / "lora-grpo-gpu")
    free["shm"] = GIB // 16
    place = places.choose_place(None, "cuda:0")
    assert place.models == tmp_path / "tmp" / "lora-grpo-gpu"
    assert (len(place.notes), place.refusal) == (1, "")
    free["tmp"] = 12 * GIB
    place = places.choose_place(None, "cuda:0")
    assert place.models == tmp_path / "tmp" / "lora-grpo-gpu"
    assert place.refusal.startswith("the 7B model needs 16 GiB for its files: 0.1 GiB are free for ")
    large = [step.name for step in scripts.steps.plan(tmp_path, "cuda:0", place.models) if step.is_large]
    assert large == ["7b", "7b-compiled"]
    finished = tmp_path / "tmp" / "lora-grpo-gpu" / "qwen2.5-7b-seed0" / "config.json"
    finished.parent.mkdir(parents=True)
    finished.touch()
    assert places.choose_place(None, "cuda:0").refusal == ""


@pytest.mark.parametrize("name", ["large", "small"])
def test_what_is_refused_is_not_started(
    name: str, run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the large model that have no room, before; what the benchmark itself refuses, by its sentence."""
    told = "print('error: bench sync with qwen2.5-7b needs about 60.1 GiB'); raise SystemExit(2)"
    plan_of(run, monkeypatch, card=CARD, **{"7b" if name == "large" else "small": told})
    monkeypatch.setattr(run, "choose_place", lambda *_: run.Place(tmp_path / "models", refusal="no room for its files"))
    assert call(run, tmp_path / "out") == 1
    why = "no room for its files" if name == "large" else "bench sync with qwen2.5-7b needs about 60.1 GiB"
    found = record(tmp_path / "out", "7b" if name == "large" else "small")
    assert (found["state"], found["why"], "rc" in found) == ("refused", why, name == "small")


def test_another_vllm_or_no_device_is_one_sentence(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is allocated, or vLLM imported."""
    monkeypatch.setattr(compat, "import_vllm", lambda: pytest.fail("imported"))
    monkeypatch.setattr(host, "check_device", lambda device: None)
    monkeypatch.setattr(compat, "vllm_release", lambda: compat.check_release("0.25.1"))
    with pytest.raises(UnsupportedVersion, match=r"vLLM 0\.25\.1 was neither tested nor read"):
        scripts.steps.look("cuda:0")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="there is no device 'cuda:63' here"):
        scripts.steps.look("cuda:63")
    with pytest.raises(SystemExit):
        scripts.steps.main("cuda:63")
    assert capsys.readouterr().out.startswith("error: there is no device 'cuda:63' here")


def test_the_script_imports_nothing_heavy() -> None:
    code = "import run, sys; print({'torch', 'vllm'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"
