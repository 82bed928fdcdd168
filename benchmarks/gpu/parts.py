"""What is run on a GPU, in order: each part is one command of the project, and where its result is read from."""

from __future__ import annotations

import json
import os
import sys
import tomllib
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SCENARIOS = REPOSITORY / "benchmarks" / "scenarios"
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma")
"""Those of tests/test_parity.py, a part each: one that is cut off leaves the others."""
PARITY = (*(f"parity-{name}" for name in ARCHITECTURES), "parity-graphs", "parity-sleep", "parity-gemm")
MEASURED = ("memory", "sync", "decode", "step", "rollback")
KERNELS = ("tune", "kernels")
"""With each shape, on a GPU only: launch settings for vLLM's kernels, and what decoding gains by them and otherwise."""
KINDS = ("card", "parity", "nan", *MEASURED, *KERNELS, "demo")
DEMO_STEPS = {"cpu": 3, "cuda": 30}


@dataclass(frozen=True)
class Part:
    """`read` finds the result when the command has ended, given what it printed; None where there is none."""

    name: str
    kind: str
    command: Sequence[str]
    read: Callable[[str], Any]


def plan(out: Path, device: str, shapes: Sequence[str], select: str | None, models: Path) -> list[Part]:
    """Everything with the first shape, then what is measured with each further one."""
    card = Part("card", "card", [sys.executable, str(HERE / "card.py"), device], last_json)
    suites = list(_suites(out, device, select))
    measured = [[*_measured(shape, out, device, models)] for shape in shapes]
    further = [part for parts in measured[1:] for part in parts]
    return [card, *suites, *measured[0], _demo(out, device), *further]


def tuned_folder(out: Path) -> Path:
    """Where launch settings are left for the parts that come after."""
    return out / "tuned"


def _measured(shape: str, out: Path, device: str, models: Path) -> Iterator[Part]:
    for kind in MEASURED:
        yield _bench(kind, kind, shape, scenario_of(shape, kind), out, device, models)
    if device != "cpu":
        command = [sys.executable, str(HERE / "tune.py"), "--shape", shape, "--out", str(tuned_folder(out))]
        yield Part(f"tune-{shape}", "tune", command, last_json)
        yield _bench("kernels", "decode", shape, SCENARIOS / "kernels.toml", out, device, models)


def scenario_of(shape: str, kind: str) -> Path:
    """The first scenario file that has settings for a part with a shape. Raises `LookupError` where there is none."""
    for path in sorted(SCENARIOS.glob("gpu-*.toml"), key=lambda path: (len(path.name), path.name)):
        tables = tomllib.loads(path.read_text())
        if tables["all"]["shape"] == shape and kind in tables:
            return path
    raise LookupError(f"no {SCENARIOS.name}/gpu-*.toml measures {kind} with shape {shape!r}")


def _suites(out: Path, device: str, select: str | None) -> Iterator[Part]:
    """Parity by architecture; with CUDA graphs, asleep and by plain products where there is a GPU; the NaN hunt."""
    tests = "tests/test_parity.py"
    for name in ARCHITECTURES:
        yield _suite(f"parity-{name}", "parity", tests, out, device, f"{name} and not graphs", select)
    if device != "cpu":
        yield _suite("parity-graphs", "parity", tests, out, device, "graphs", select)
        yield _suite("parity-sleep", "parity", "tests/test_gpu_sleep.py", out, device, None, select)
        yield _suite("parity-gemm", "parity", "tests/test_lora_gemm.py", out, device, None, select)
    yield _suite("nan", "nan", "tests/test_nan_hunt.py", out, device, None, select)


def _suite(name: str, kind: str, tests: str, out: Path, device: str, own: str | None, select: str | None) -> Part:
    report = out / "suites" / f"{name}.xml"
    options = ["-q", "--device", device, "--junitxml", str(report), "-o", "junit_family=xunit1"]
    # Without the project's pytest settings, some of which need plugins that a bare host does not have.
    bare = ["-c", os.devnull, "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    expression = " and ".join(f"({one})" for one in (own, select) if one is not None)
    chosen = ["-k", expression] if expression else []
    command = [sys.executable, "-m", "pytest", tests, *bare, *options, *chosen]
    return Part(name, kind, command, lambda printed: _cases(report))


def _bench(kind: str, part: str, shape: str, settings: Path, out: Path, device: str, models: Path) -> Part:
    results = out / "bench" / f"{kind}-{shape}"
    options = {"--shape": shape, "--device": device, "--out": results, "--models": models}
    scenario = ["--scenario", str(settings)]
    command = [*_project("bench", part), *scenario, *(str(word) for pair in options.items() for word in pair)]
    return Part(f"{kind}-{shape}", kind, command, lambda printed: _figures(part, results / "results.json"))


def _demo(out: Path, device: str) -> Part:
    steps = DEMO_STEPS[device.partition(":")[0]]
    command = [*_project("demo"), "--output-dir", str(out / "demo"), "--steps", str(steps)]
    return Part("demo", "demo", command, last_json)


def _project(*words: str) -> list[str]:
    return [sys.executable, "-m", "lora_grpo", *words]


def last_json(printed: str) -> Any:
    """The last line that is a JSON object."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            return json.loads(line)
    return None


def _figures(kind: str, results: Path) -> Any:
    """The part's own rows of what the benchmark wrote; the whole of it stays where it is, for reports and plots."""
    if not results.exists():
        return None
    document = json.loads(results.read_text())
    return {name: document[name] for name in ("complete", "failures", "card", kind)}


def _cases(report: Path) -> Any:
    """Each test with its outcome, and the figures that it recorded."""
    if not report.exists():
        return None
    return [
        {
            "test": case.get("name"),
            "outcome": next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"),
            "seconds": float(case.get("time", "nan")),
            **{found.attrib["name"]: found.attrib["value"] for found in case.iter("property")},
        }
        for case in xml.etree.ElementTree.parse(report).iter("testcase")
    ]
