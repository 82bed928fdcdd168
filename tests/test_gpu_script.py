"""benchmarks/gpu/run.py without a GPU: the dry run of its parts, and what it does when one fails or time is over."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_grpo.bench.scenario import plan_parts
from lora_grpo.bench.strategies import OTHER_KERNELS
from tests.test_parity import ARCHITECTURES

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "benchmarks" / "gpu" / "run.py"
SHAPES = ("tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
MEASURED = ["memory", "sync", "decode", "step", "rollback"]
PARITY = [f"parity-{name}" for name in ARCHITECTURES]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return importlib.import_module("run")


def plan_of(run: ModuleType, monkeypatch: pytest.MonkeyPatch, **codes: str) -> None:
    """Have the script run these programs instead of its parts."""

    def plan(out: Path, *rest: Any) -> list[Any]:
        return [
            run.Part(name, name, [sys.executable, "-c", code], importlib.import_module("parts").last_json)
            for name, code in codes.items()
        ]

    monkeypatch.setattr(run, "plan", plan)


def states(out: Path) -> dict[str, str]:
    return json.loads((out / "summary.json").read_text())["parts"]


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "parts" / f"{name}.json").read_text())


@pytest.mark.vllm
def test_the_dry_run(tmp_path: Path) -> None:
    """Suites cut to a few tests, which the whole test run has all of; everything else as on a GPU."""
    only = ",".join(["card", "parity-qwen2", "nan", *MEASURED, "demo"])
    chosen = "test_one_call_mixes_base_and_versions and qwen2 or test_mixed_batches"
    options = ["--device", "cpu", "--shape", "tiny", "--only", only, "--select", chosen]
    script = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    tails = [record(tmp_path, path.stem)["tail"] for path in (tmp_path / "parts").iterdir()]
    assert done.returncode == 0, (done.stderr, states(tmp_path), tails)
    names = ["card", "parity-qwen2", "nan", *(f"{kind}-tiny" for kind in MEASURED), "demo"]
    assert states(tmp_path) == dict.fromkeys(names, "passed")
    found = {name: record(tmp_path, name) for name in names}
    assert all(part["rc"] == 0 and part["seconds"] > 0 and part["tail"] for part in found.values())
    results = {name: part["result"] for name, part in found.items()}
    assert results["card"]["vllm"]["known_by"] == "run"
    assert results["card"]["missing_packages"] == []
    assert results["card"]["card"]["device"] == "cpu"
    assert [(case["test"], case["outcome"]) for case in results["parity-qwen2"]] == [
        ("test_one_call_mixes_base_and_versions[qwen2]", "passed")
    ]
    (hunted,) = results["nan"]
    assert hunted["outcome"] == "passed"
    assert 0 < float(hunted["worst_share_of_allowed"]) <= 1
    for kind in MEASURED:
        result = results[f"{kind}-tiny"]
        assert result["complete"]
        assert result["failures"] == []
        assert result["card"]["device"] == "cpu"
        assert {row["shape"] for row in result[kind]} == {"tiny"}
        assert "native" in {row["strategy"] for row in result[kind]}
        assert (tmp_path / "bench" / f"{kind}-tiny" / "results.json").exists()
    assert results["demo"]["versions"] == results["demo"]["steps"] + 1
    assert not list(Path("/dev/shm").glob("lora-grpo-gpu-*"))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_plan(run: ModuleType, device: str, tmp_path: Path) -> None:
    """In order, each further shape after everything with the first; each with settings of its own shape."""
    planned = run.plan(tmp_path, device, list(SHAPES), None, tmp_path / "models")
    alone = ["parity-graphs", "parity-sleep", "parity-gemm"] if device != "cpu" else []
    kinds = [*MEASURED, *(["tune", "kernels"] if device != "cpu" else [])]
    first = ["card", *PARITY, *alone, "nan", *(f"{kind}-{SHAPES[0]}" for kind in kinds), "demo"]
    further = [f"{kind}-{shape}" for shape in SHAPES[1:] for kind in kinds]
    assert [part.name for part in planned] == first + further
    assert {part.kind for part in planned} == {"card", "parity", "nan", *kinds, "demo"}
    for part in planned:
        words = part.command
        if part.kind in MEASURED:
            shape = part.name.removeprefix(f"{part.kind}-")
            tables = tomllib.loads(Path(words[words.index("--scenario") + 1]).read_text())
            assert (words[words.index("--shape") + 1], tables["all"]["shape"]) == (shape, shape)
            assert part.kind in tables
        if part.kind == "kernels":
            path = Path(words[words.index("--scenario") + 1])
            settings = plan_parts("decode", path, {"shape": words[words.index("--shape") + 1]})["decode"]
            assert settings.strategies == ("native", *(name for name in OTHER_KERNELS if name != "native-stock"))
        if part.kind not in ("demo", "tune"):
            assert device in words
    with pytest.raises(LookupError, match=r"no scenarios/gpu-\*\.toml measures memory with shape 'huge'"):
        run.plan(tmp_path, device, ["huge"], None, tmp_path)


@pytest.mark.vllm
def test_each_architecture_is_a_part_and_none_is_left_out(run: ModuleType, tmp_path: Path) -> None:
    """A suite that time runs out for is then run again by itself, and not with four others."""
    planned = run.plan(tmp_path, "cuda:0", ["tiny"], None, tmp_path)
    suites = ("tests/test_parity.py", "tests/test_gpu_sleep.py", "tests/test_lora_gemm.py")
    whole = [*suites, "-q", "--device", "cuda:0"]
    every, *chosen = collected([whole, *(list(part.command[3:]) for part in planned if part.kind == "parity")])
    assert len(chosen) == len(ARCHITECTURES) + 3
    assert all(chosen)
    assert sorted(name for names in chosen for name in names) == sorted(every)


def collected(commands: list[list[str]]) -> list[list[str]]:
    """The tests that each pytest command would run, found in one process."""
    code = (
        "import json, sys, pytest\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    print('=====')\n"
        "    assert pytest.main([*words, '--collect-only']) == 0\n"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    return [[line for line in part.splitlines() if "::" in line] for part in done.stdout.split("=====\n")[1:]]


def test_a_suite_that_is_cut_off_leaves_what_it_has_done(tmp_path: Path) -> None:
    """As a time limit ends it: the tests that have finished are in the report."""
    (tmp_path / "tests").mkdir()
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_two.py").write_text(
        "import time, pathlib\n\ndef test_quick():\n    pass\n\n"
        "def test_long():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    report = tmp_path / "report.xml"
    words = [
        "tests/test_two.py",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "-p",
        "no:cacheprovider",
        "--junitxml",
        str(report),
    ]
    running = subprocess.Popen([sys.executable, "-m", "pytest", *words], cwd=tmp_path, stdout=subprocess.PIPE)
    while running.poll() is None and not (tmp_path / "started").exists():
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    printed, _ = running.communicate(timeout=30)
    assert running.returncode == 2, printed
    assert 'name="test_quick"' in report.read_text()


def test_the_commit_is_told_where_there_is_no_repository(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of(run, monkeypatch, card="import os, json; print(json.dumps({'is': os.environ['LORA_GRPO_COMMIT']}))")
    assert run.main(["--out", str(tmp_path), "--commit", "abc1234"]) == 0
    assert record(tmp_path, "card")["result"] == {"is": "abc1234"}
    monkeypatch.setenv("LORA_GRPO_COMMIT", "def5678")
    assert run.main(["--out", str(tmp_path), "--again"]) == 0
    assert record(tmp_path, "card")["result"] == {"is": "def5678"}


def test_it_goes_on_past_a_failed_part(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(
        run,
        monkeypatch,
        card="print('{\"a\": 1}')",
        parity="print('so far'); raise SystemExit(3)",
        sync="import os, json; print(json.dumps({k: os.environ[k] for k in ('HF_HUB_OFFLINE', 'PYTHONPATH')}))",
    )
    site = tmp_path / "site"
    assert run.main(["--out", str(tmp_path), "--site", str(site)]) == 1
    assert states(tmp_path) == {"card": "passed", "parity": "failed", "sync": "passed"}
    assert record(tmp_path, "card")["result"] == {"a": 1}
    failed = record(tmp_path, "parity")
    assert (failed["rc"], failed["result"], failed["tail"]) == (3, None, ["so far"])
    seen = record(tmp_path, "sync")["result"]
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["PYTHONPATH"].split(os.pathsep)[:2] == [str(REPOSITORY), str(site)]


def test_the_same_command_goes_on(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed is kept, what failed is run again; a choice leaves the rest alone."""
    mark = tmp_path / "mended"
    starts = tmp_path / "starts"
    noted = f"open({str(starts)!r}, 'a').write"
    fails_first = f"import os, sys; {noted}('b'); sys.exit(not os.path.exists({str(mark)!r}))"
    plan_of(run, monkeypatch, card=f"{noted}('a')", parity=fails_first, demo=f"{noted}('c')")
    out = ["--out", str(tmp_path)]
    assert run.main([*out, "--only", "card,parity"]) == 1
    mark.touch()
    assert run.main(out) == 0
    assert states(tmp_path) == {"card": "kept", "parity": "passed", "demo": "passed"}
    assert run.main([*out, "--again", "--only", "card"]) == 0
    assert starts.read_text() == "abbca"
    with pytest.raises(SystemExit):
        run.main([*out, "--only", "parrity"])


def test_ctrl_c_is_written_down(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    plan_of(run, monkeypatch, card="pass", parity=stops, demo="pass")
    assert run.main(["--out", str(tmp_path)]) == 1
    assert states(tmp_path) == {"card": "passed", "parity": "interrupted", "demo": "not started"}
    assert record(tmp_path, "parity")["rc"] == -signal.SIGTERM


def test_time_that_is_over(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part takes half of it at most and is asked to end, which keeps what it has; then nothing more is started."""
    keeps = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(130)); print('{\"kept\": 2}', flush=True); "
        "time.sleep(60)"
    )
    plan_of(run, monkeypatch, card="pass", parity=keeps, sync=keeps, demo="pass")
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    assert run.main(["--out", str(tmp_path), "--minutes", "0.1"]) == 1
    assert states(tmp_path) == {"card": "passed", "parity": "cut off", "sync": "cut off", "demo": "not started"}
    cut = record(tmp_path, "parity")
    assert (cut["rc"], cut["result"]) == (130, {"kept": 2})
    assert cut["seconds"] == pytest.approx(3.0, abs=1.5)


def test_a_part_that_does_not_end_is_ended(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    plan_of(run, monkeypatch, card=deaf, demo="pass")
    monkeypatch.setattr(run, "LEAST_S", 0.2)
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    assert run.main(["--out", str(tmp_path), "--minutes", "0.1"]) == 1
    assert states(tmp_path) == {"card": "cut off", "demo": "passed"}
    assert record(tmp_path, "card")["rc"] == -signal.SIGKILL


def test_the_script_imports_nothing_heavy() -> None:
    code = "import run, sys; print({'torch', 'vllm'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"
