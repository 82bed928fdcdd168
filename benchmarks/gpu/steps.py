"""What is run on a GPU, most valuable first: each step is one process with its limit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DEMO_STEPS = {"cpu": 1, "cuda": 30}
SHAPES = {"cpu": ("tiny-tied", "tiny"), "cuda": ("qwen2.5-0.5b", "qwen2.5-7b")}
"""By device, what is measured; in a dry run two tiny ones, of which one ties its output layer like the 0.5B."""
SUITES = {
    "tiny": (
        ("tests/test_parity.py", "tests/test_nan_hunt.py", "tests/test_direct_load.py"),
        "(test_parity and qwen2 or test_nan_hunt) and not graphs or test_direct_load",
        "test_one_call_mixes_base_and_versions and qwen2 or test_mixed_batches",
    ),
    "experts": (("tests/test_gpu_experts.py",), "test_gpu_experts", "test_gpu_experts"),
    "parity": (
        ("tests/test_parity.py",),
        "not qwen2 and not graphs",
        "test_one_call_mixes_base_and_versions and llama",
    ),
    "graphs": (
        ("tests/test_gpu_sleep.py", "tests/test_parity.py", "tests/test_nan_hunt.py"),
        "graphs or test_gpu_sleep",
        "test_gpu_sleep",
    ),
}
"""Test files, which of their tests, and which few of those in a dry run: the whole test run has all of them."""
FAMILIES = ("gpt_oss", "gemma3", "qwen3_5")
"""Of the table of models: a mixture and wrappers, one of a delta net, each tiny and with every control."""
CHECKPOINTED = "--checkpointing on --prompt 512"
PROGRAMS = {
    "trainer": f"benchmarks.trainer --shape 0.5b --tokens 512,1024,4096 {CHECKPOINTED}",
    "trainer-7b": f"benchmarks.trainer --shape 7b --tokens 512,2048 {CHECKPOINTED}",
    "population": "benchmarks.population --rows 1,8,32 --tokens 64",
    "rates": "benchmarks.rates --lone 1",
}
"""Programs that have a page of their own, and what of them is measured."""
DRY = {
    "trainer": "benchmarks.trainer --shape small --tokens 8 --rows 2 --dtype float32 --subjects estimate,padded",
    "population": "benchmarks.population --shape tiny --rows 1 --tokens 2 --members 2 --repeats 1",
}
REPEATED = ("trainer-7b", "parity", "7b-compiled", "families", "experts", "rates")
"""Not in a dry run: with tiny models, where nothing is compiled, they do what the steps before them did, or what the
test run does; or there is nothing to do without a GPU."""


@dataclass(frozen=True)
class Step:
    """`expected_s` is what it took on an H100 or H200 (7b: with about 20 s to draw and write the model); of
    7b-compiled, population, families, rates and graphs an estimate. `shape` is the model it cannot do without. One that
    is `warm` may begin with vLLM imported."""

    name: str
    expected_s: int
    limit_s: int
    command: Sequence[str]
    shape: str | None = None
    warm: bool = True

    @property
    def is_large(self) -> bool:
        return self.name.startswith("7b")


def plan(out: Path, device: str, models: Path) -> list[Step]:
    """In the order of their value: what is slow costs only what stands after it."""
    kind = device.partition(":")[0]
    small, large = SHAPES[kind]
    demo = [sys.executable, "-m", "lora_grpo", "demo", "--output-dir", str(out / "demo")]
    invariance = [*_script("invariance.py"), "--device", device, "--model", str(models / f"{small}-seed0")]
    steps = [
        Step("card", 30, 60, [*_script("card.py"), device]),
        _suite("tiny", 110, 150, out, device),
        _figures("7b", 170, 280, large, out, device, models),
        Step("demo", 45, 90, [*demo, "--steps", str(DEMO_STEPS[kind])]),
        _figures("7b-compiled", 165, 240, large, out, device, models),
        _program("trainer", 45, 70, out, device),
        _program("trainer-7b", 65, 110, out, device),
        _program("population", 70, 110, out, device),
        Step("families", 160, 220, [sys.executable, "-m", "tests.model_table", *FAMILIES]),
        _suite("experts", 70, 100, out, device),
        _program("rates", 110, 160, out, device),
        _figures("0.5b", 65, 110, small, out, device, models),
        _suite("parity", 140, 190, out, device),
        # Its switch, which there is on a GPU, is for a whole process.
        Step("invariance", 55, 90, invariance, warm=kind == "cpu"),
        _suite("graphs", 110, 180, out, device),
    ]
    return [step for step in steps if kind != "cpu" or step.name not in REPEATED]


def scenario(name: str, device: str) -> Path:
    """What of figures a step takes; in a dry run as little as there can be."""
    return HERE / ("dry" if device == "cpu" else "") / f"{name}.toml"


def _script(name: str) -> list[str]:
    return [sys.executable, str(HERE / name)]


def _figures(name: str, expected_s: int, limit_s: int, shape: str, out: Path, device: str, models: Path) -> Step:
    results = out / "bench" / name
    at = ["--scenario", str(scenario(name, device)), "--shape", shape, "--device", device]
    command = [sys.executable, "-m", "lora_grpo", "bench", "all", *at, "--out", str(results), "--models", str(models)]
    return Step(name, expected_s, limit_s, command, shape)


def _program(name: str, expected_s: int, limit_s: int, out: Path, device: str) -> Step:
    module, *sizes = (DRY if device == "cpu" and name in DRY else PROGRAMS)[name].split()
    results = out / "programs" / (name if name == "rates" else f"{name}.json")
    command = [sys.executable, "-m", module, "--device", device, "--out", str(results), *sizes]
    return Step(name, expected_s, limit_s, command)


def _suite(name: str, expected_s: int, limit_s: int, out: Path, device: str) -> Step:
    """Tests in one process, without the project's pytest settings: a bare host may lack the plugins that they need."""
    files, chosen, few = SUITES[name]
    report = out / "logs" / f"{name}.xml"
    bare = ["-c", os.devnull, "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    options = ["-q", "--device", device, "--junitxml", str(report), "-o", "junit_family=xunit1"]
    expression = few if device == "cpu" else chosen
    command = [sys.executable, "-m", "pytest", *files, *bare, *options, "-k", expression]
    return Step(name, expected_s, limit_s, command)
