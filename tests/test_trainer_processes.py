"""`GRPOTrainer` in two real processes: the run that one process would make, whoever holds the weights."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lora_grpo.adapters.peft_form.modules import whole
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.errors import ConfigError, EngineError, RewardError
from lora_grpo.grpo.processes import Processes
from lora_grpo.metrics.log import read_metrics
from lora_grpo.trainer.guards import Guard, NonFinite
from lora_grpo.types import Group
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import tiny_model
from tests.tiny_trainer import CONFIG, share_of_low_bytes, tiny_trainer
from tests.two_processes import TIMEOUT_S, fsdp2, in_two

STEPS = 5
KINDS = ("ddp", "fsdp2")
HELD_OUT = [{"prompt": f"letter {index}: ", "long": index > 2} for index in range(5)]


def config(processes: int, **changes: Any) -> Any:
    """Two updates of 16 rows a step, in micro-batches of 8 over however many processes."""
    plain = {"total_steps": STEPS, "gradient_accumulation_steps": 2 // processes, "generation_batch_size": 32}
    plain |= {"vllm_importance_sampling_correction": False, "scale_rewards": "batch", "eval_every": 2}
    return CONFIG.replace(**{**plain, **changes})


class PerProcess(FakeEngine):
    """Stands for an engine in each process; notes what it was asked for, and fails when told to."""

    def __init__(self, base: Path) -> None:
        super().__init__(reply, tokenizer=AutoTokenizer.from_pretrained(base))
        self.asked: list[list[Any]] = []
        self.fails_at = -1

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    def generate(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> list[Group]:
        self.asked.append(list(prompts))
        if len(self.asked) == self.fails_at:
            raise EngineError("out of memory")
        return super().generate(prompts, *args, **kwargs)


def reply(prompt: Any, version: Any, seed: int) -> str:
    return "".join(random.Random(seed).choices("aé", k=5))


def run(base: Path, engine: Any, folder: Path, settings: Any, **kwargs: Any) -> dict[str, Any]:
    """A whole run, as a script would have it: every process says the same."""
    kwargs = {"store_root": folder / "root", "eval_dataset": HELD_OUT, "reward_funcs": noted, **kwargs}
    resumes, receipts = kwargs.pop("resumes", False), kwargs.pop("receipts", [])
    NOTED.clear()
    with tiny_trainer(base, engine, folder / "run", settings, **kwargs) as trainer:
        noting(trainer.sync, receipts)
        if resumes:
            trainer.resume()
        result = trainer.train()
        weights = {name: whole(p.detach()).clone() for name, p in trainer.policy.parameters.items()}
        return {"result": result, "weights": weights, "head": trainer.version, "noted": list(NOTED)}


def noting(sync: Any, receipts: list[Any]) -> None:
    push = sync.push

    def noted_push(*args: Any, **kwargs: Any) -> Any:
        version = push(*args, **kwargs)
        receipts.append(sync.last_receipt)
        return version

    sync.push = noted_push


NOTED: list[list[str]] = []


def noted(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    NOTED.append([f"{prompt}{completion}" for prompt, completion in zip(prompts, completions, strict=True)])
    return share_of_low_bytes(completions)


# What the two processes do.


def whole_runs(accelerator: Any, folder: Path) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        engine = PerProcess(folder / "base")
        with fsdp2(accelerator) if kind == "fsdp2" else nullcontext():
            found[kind] = run(folder / "base", engine, folder / kind, config(2)) | {"asked": engine.asked}
    return found


def interrupted(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Three steps, a stop, and the rest; beside it, all in one go."""
    found = {}
    for name, steps, resumes in (("stopped", 3, False), ("stopped", STEPS, True), ("through", STEPS, False)):
        settings = config(2, total_steps=steps, lr_scheduler_type="constant")
        with fsdp2(accelerator):
            found[name] = run(folder / "base", PerProcess(folder / "base"), folder / name, settings, resumes=resumes)
    return found


def failures(accelerator: Any, folder: Path) -> dict[str, Any]:
    """An engine that fails in one process, a reward in the other, a NaN that a guard goes back from."""
    found: dict[str, Any] = {}
    first = accelerator.process_index == 0

    def attempt(name: str, engine: PerProcess, **kwargs: Any) -> None:
        started = time.perf_counter()
        try:
            settings = config(2, scale_rewards="none")
            found[name] = run(folder / "base", engine, folder / name, settings, **kwargs)["result"]["rollbacks"]
        except Exception as error:  # noqa: BLE001 - what it is, is the question
            found[name] = type(error), str(error), time.perf_counter() - started

    broken = PerProcess(folder / "base")
    broken.fails_at = -1 if first else 3
    attempt("engine", broken)
    attempt("reward", PerProcess(folder / "base"), reward_funcs=raises_in_step_2)
    POISON["left"] = 1
    attempt("guard", PerProcess(folder / "base"), guard=Guard(NonFinite(), to="parent"), reward_funcs=poisons_step_3)
    return found


POISON = {"left": 0}


def raises_in_step_2(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
    if trainer_state.global_step == 2:
        raise ValueError("no such answer")
    return share_of_low_bytes(completions)


def poisons_step_3(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
    """Large enough that the loss is not finite: once."""
    bad = trainer_state.global_step == 3 and POISON["left"] > 0
    POISON["left"] -= bad
    return [value * (3e38 if bad else 1.0) for value in share_of_low_bytes(completions)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-test-") as name:
        tiny_model("llama", Path(name) / "base")
        yield Path(name)


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return in_two({"whole_runs": whole_runs, "interrupted": interrupted, "failures": failures}, folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(folder / "base", PerProcess(folder / "base"), folder / "alone", config(1))


# What has to come of it.


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a hundredth of an update on average: other micro-batches are padded, and so rounded, otherwise.

    Adam makes a share of a whole update of the rounding of a gradient near zero, so that single weights, and how many
    they are, depend on the processor.
    """
    for name, tensor in expected.items():
        apart = (got[name] - tensor).abs()
        assert float(apart.mean()) <= 0.01 * CONFIG.learning_rate, name
        assert float(apart.max()) <= CONFIG.learning_rate, name


@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_are_those_of_one_process(
    both: list[dict[str, Any]], alone: dict[str, Any], folder: Path, kind: str
) -> None:
    """Prompts, seeds, completions and rewards to the letter, weights and metrics to rounding."""
    steps, expected = (
        [record for record in read_metrics(folder / name / "run") if record["event"] == "step"]
        for name in (kind, "alone")
    )
    assert len(steps) == STEPS
    for one, other in zip(steps, expected, strict=True):
        numbers = {name for name, value in other.items() if isinstance(value, float | int)}
        timings = {name for name in numbers if name.startswith(("time", "sync/", "step_time", "archive/"))}
        assert one.keys() == other.keys()
        for name in numbers - timings:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    for results in both:
        found = results["whole_runs"][kind]
        assert_near(found["weights"], alone["weights"])
        assert found["head"].number == STEPS + 1
        assert found["result"]["reward_after"] == alone["result"]["reward_after"]
    assert both[0]["whole_runs"][kind]["noted"] == alone["noted"]


def test_each_process_samples_its_part(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Rewards are given once, in the first process, on what both made."""
    halves = [results["whole_runs"]["ddp"]["asked"] for results in both]
    assert [len(call) for call in halves[0]] == [2, 4, 4, 2, 4, 4, 2, 4, 2]
    assert [len(call) for call in halves[1]] == [3, 4, 4, 3, 4, 4, 3, 4, 3]
    assert both[1]["whole_runs"]["ddp"]["noted"] == []


def test_one_run_is_written(both: list[dict[str, Any]], folder: Path) -> None:
    records = read_metrics(folder / "ddp" / "run")
    assert [record["event"] for record in records].count("start") == 1
    assert [record["event"] for record in records].count("end") == 1
    assert len(list((folder / "ddp" / "run" / "evaluations").iterdir())) == 4
    assert json.loads(json.dumps(both[0]["whole_runs"]["ddp"]["result"])) == both[1]["whole_runs"]["ddp"]["result"]


def test_a_sharded_run_that_was_stopped_goes_on_to_the_bit(both: list[dict[str, Any]]) -> None:
    for results in both:
        resumed, through = results["interrupted"]["stopped"], results["interrupted"]["through"]
        assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in through["weights"].items())
        assert resumed["head"].digest == through["head"].digest


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [("engine", EngineError, "process 1: out of memory"), ("reward", RewardError, "no such answer")],
)
def test_what_fails_in_one_ends_both(both: list[dict[str, Any]], name: str, kind: Any, words: str) -> None:
    for results in both:
        raised, said, seconds = results["failures"][name]
        assert raised is kind
        assert words in said
        assert seconds < TIMEOUT_S / 2


def test_a_guard_takes_both_back(both: list[dict[str, Any]]) -> None:
    assert [results["failures"]["guard"] for results in both] == [1, 1]


def real_engines(accelerator: Any, folder: Path) -> dict[str, Any]:
    """vLLM in each of two processes, the trainer's weights sharded over both."""
    from lora_grpo.engines.vllm_local import VLLMEngine

    engine = VLLMEngine(folder / "base", max_lora_rank=16, **ENGINE_ARGS)
    receipts: list[Any] = []
    with fsdp2(accelerator):
        found = run(folder / "base", engine, folder / "real", REAL(2), receipts=receipts)
    engine.close()
    alive = torch.ones(1)
    torch.distributed.all_reduce(alive)
    return found | {"receipts": receipts, "alive": alive.item()}


REAL = partial(config, total_steps=2, vllm_importance_sampling_correction=True, canary_every=1)


@pytest.mark.vllm
def test_an_engine_in_each_process_serves_what_the_first_one_published(folder: Path, llama_engine: Any) -> None:
    """Each proves its own slots; the process group is the trainer's again afterwards, when the engines are closed."""
    expected = run(folder / "base", llama_engine, folder / "real-alone", REAL(1))
    for results in in_two({"real": real_engines}, folder):
        found = results["real"]
        assert [(r.load.proof, r.version.number, r.load.proven_bytes > 0) for r in found["receipts"]] == [
            ("slots", number, True) for number in (1, 2, 3)
        ]
        assert found["alive"] == 2
        assert_near(found["weights"], expected["weights"])
    steps = [record for record in read_metrics(folder / "real" / "run") if record["event"] == "step"]
    assert [record["canary/verdict"] for record in steps] == ["ok", "ok"]


@pytest.mark.vllm
def test_an_engine_that_would_leave_its_trainer_alone_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_grpo.engines.vllm_local import VLLMEngine

    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2.*VLLMServerEngine"):
        VLLMEngine(folder / "base", tensor_parallel_size=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="one of 2 processes that are not connected yet: build accelerate's"):
        VLLMEngine(folder / "base")
    with pytest.raises(ConfigError, match="its process group has 1, so it would train alone"):
        Processes(SimpleNamespace(num_processes=1, process_index=0))  # type: ignore[arg-type]
