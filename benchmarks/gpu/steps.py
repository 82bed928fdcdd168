"""What is run on a GPU, most valuable first, each step a process with its limit; and what came of it: a JSON file each,
a summary, and one archive of everything.

Two are here: `steps.py DEVICE` looks at the host as the others will find it; `steps.py DEVICE MODEL` counts sampled
tokens whose log-prob is to the bit that of scoring them as a prompt, on a GPU under VLLM_BATCH_INVARIANT=1."""

import json
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SIZES = {"cpu": (4, 8), "cuda": (64, 64)}  # of invariance: rows, and tokens of each
SHAPES = {"cpu": ("tiny-tied", "tiny"), "cuda": ("qwen2.5-0.5b", "qwen2.5-7b")}
"""By device, what is measured; in a dry run two tiny ones, of which one ties its output layer like the 0.5B."""
SUITES = {
    "tiny": (
        "parity nan_hunt direct_load",
        "(test_parity and qwen2 or test_nan_hunt) and not graphs or test_direct_load",
        "test_one_call_mixes_base_and_versions and qwen2 or test_mixed_batches",
    ),
    "experts": ("gpu_experts", "test_gpu_experts", "test_gpu_experts"),
    "parity": ("parity", "not qwen2 and not graphs", "test_one_call_mixes_base_and_versions and llama"),
    "graphs": ("gpu_sleep parity nan_hunt", "graphs or test_gpu_sleep", "test_gpu_sleep"),
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

WIDTH = 160  # of the table of steps
ARCHIVE, SUMMARY = "results.tar.gz", "summary.json"
_LEFT_OUT = (ARCHIVE, ".safetensors", ".pt", ".new")
"""The archive itself, and what of a demo run are weights."""


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
    own = [sys.executable, str(HERE / "steps.py"), device]
    steps = [
        Step("card", 30, 60, own),
        _suite("tiny", 110, 150, out, device),
        _figures("7b", 170, 280, large, out, device, models),
        Step("demo", 45, 90, [*demo, "--steps", "1" if kind == "cpu" else "30"]),
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
        Step("invariance", 55, 90, [*own, str(models / f"{small}-seed0")], warm=kind == "cpu"),
        _suite("graphs", 110, 180, out, device),
    ]
    return [step for step in steps if kind != "cpu" or step.name not in REPEATED]


def scenario(name: str, device: str) -> Path:
    return HERE / ("dry" if device == "cpu" else "") / f"{name}.toml"


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
    modules, chosen, few = SUITES[name]
    files = [f"tests/test_{module}.py" for module in modules.split()]
    bare = ["-c", os.devnull, "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    options = ["-q", "--device", device, "--junitxml", str(out / "logs" / f"{name}.xml"), "-o", "junit_family=xunit1"]
    command = [sys.executable, "-m", "pytest", *files, *bare, *options, "-k", few if device == "cpu" else chosen]
    return Step(name, expected_s, limit_s, command)


class Record:
    """How each step stands: passed, failed, refused, cut off, interrupted, not started."""

    def __init__(self, out: Path, steps: Sequence[Step], notes: Sequence[str]) -> None:
        self.out, self.steps, self.notes = out, steps, list(notes)
        for folder in ("steps", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        self.done = {step.name: json.loads(path.read_text()) for step in steps if (path := self._path(step)).exists()}

    def state(self, step: Step) -> str:
        return str(self.done.get(step.name, {}).get("state", "not started"))

    def keep(self, step: Step, done: dict[str, Any]) -> None:
        self.done[step.name] = {"step": step.name, "expected_s": step.expected_s, "limit_s": step.limit_s, **done}
        write(self._path(step), self.done[step.name])
        why = f": {done['why']}" if done.get("why") else ""
        print(f"{step.name}: {done['state']} after {done['seconds']} s{why}", flush=True)
        self.save()

    def save(self) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        rows = [self._row(step) for step in self.steps]
        command = shlex.join(["python", "benchmarks/gpu/run.py", *sys.argv[1:]])
        write(self.out / SUMMARY, {"command": command, "at": at, "notes": self.notes, "steps": rows})
        staged = self.out / f"{ARCHIVE}.new"
        with tarfile.open(staged, "w:gz", compresslevel=3) as archive:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and not path.name.endswith(_LEFT_OUT):
                    archive.add(path, path.relative_to(self.out))
        os.replace(staged, self.out / ARCHIVE)

    def show(self) -> None:
        from lora_grpo.metrics.render import table

        Console(width=WIDTH).print(table([self._row(step) for step in self.steps], "steps"))

    def _row(self, step: Step) -> dict[str, Any]:
        done = self.done.get(step.name, {})
        return {
            "step": step.name,
            "state": self.state(step),
            "seconds": done.get("seconds", "-"),
            "estimate for a GPU, s": step.expected_s,
            "limit, s": step.limit_s,
            "why": done.get("why") or "-",
        }

    def _path(self, step: Step) -> Path:
        return self.out / "steps" / f"{step.name}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    staged = path.with_name(f"{path.name}.new")
    staged.write_text(json.dumps(content, indent=1))
    os.replace(staged, path)


def look(device: str) -> dict[str, Any]:
    """The card. Raises for a device that is not there or an unknown vLLM, before anything is allocated."""
    from lora_grpo.bench import host
    from lora_grpo.engines import compat
    from lora_grpo.engines.compat.patching import HOPPER, kernel_is_mended

    host.check_device(device)
    release = compat.vllm_release()
    found: dict[str, Any] = {"card": host.card(device), "memory_bytes": host.memory(device)}
    print(json.dumps(found), flush=True)
    compat.import_vllm()
    import torch

    # This process may be a fork: here it shows whether one can compute.
    one = torch.ones(8, 8, device=device)
    assert float((one @ one).sum()) == 512
    found["vllm"] = {"release": release, "known_by": compat.RELEASES[release]}
    capability = compat.compute_capability()
    return {**found, "compute_capability": capability, "kernels_mended": capability == HOPPER and kernel_is_mended()}


def invariance(device: str, model: str) -> dict[str, Any]:
    if device != "cpu":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    from lora_grpo.bench.plan import Subject
    from lora_grpo.bench.strategies import Native
    from lora_grpo.engines import compat

    compat.import_vllm()
    from vllm import envs

    rows, length = SIZES[device.partition(":")[0]]
    with tempfile.TemporaryDirectory() as folder:
        limits = {"max_model_len": 256, "max_num_seqs": rows, "gpu_memory_utilization": 0.2}
        strategy = Native(Subject("native", model, 16, "all-linear", device, folder, folder, **limits))
        without = equal_share(strategy, rows, length)
        strategy.trainer.randomise(0.2)
        strategy.sync()
        shares = {"with_adapter": equal_share(strategy, rows, length), "without_adapter": without}
        strategy.close()
    on = os.environ.get("VLLM_BATCH_INVARIANT") == "1" and "VLLM_BATCH_INVARIANT" in envs.environment_variables
    return {"batch_invariant": on, **shares, "tokens": rows * length, "model": Path(model).name}


def equal_share(strategy: Any, rows: int, length: int) -> float:
    import torch

    from lora_grpo.types import Sampling

    drawn = torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()
    groups = strategy.generate(drawn, Sampling(n=1, max_tokens=length, temperature=1.0, seed=1, ignore_eos=True))
    made = [(group.prompt_token_ids, group.completions[0]) for group in groups]
    scored = strategy.logprobs([[*prompt, *completion.token_ids] for prompt, completion in made])
    sampled = [logprob for _, completion in made for logprob in completion.logprobs]
    again = [logprob for row in scored for logprob in row[-length:]]
    return sum(one == other for one, other in zip(sampled, again, strict=True)) / len(sampled)


def main(device: str, model: str | None = None) -> None:
    from lora_grpo.errors import LoraGrpoError

    try:
        print(json.dumps(look(device) if model is None else invariance(device, model)), flush=True)
    except LoraGrpoError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
