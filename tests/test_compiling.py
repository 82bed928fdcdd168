"""Models with LoRA compiled on the CPU: the trainer's policy all the same, whichever engine's, after every hot-swap."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.local import starting
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.kernels import SlotRows
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, refill_lora, tiny_lora

pytestmark = pytest.mark.vllm

PROMPTS = [list(range(20 + row, 30 + row)) for row in range(6)]
OPERATOR = "lora_grpo::add_cpu_lora"
COMPILED = {**ENGINE_ARGS, "enforce_eager": False, "gpu_memory_utilization": 0.05}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What vLLM keeps of compiled models, empty at first."""
    folder = tmp_path_factory.mktemp("vllm-cache")
    envs = pytest.importorskip("vllm.envs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_CACHE_ROOT", str(folder))
        envs.disable_envs_cache()  # an engine before has frozen it
        yield folder
    envs.disable_envs_cache()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def engines(llama_dir: Path, cache: Path) -> Iterator[list[VLLMEngine]]:
    """Two of one configuration: the second finds the model that the first one compiled."""
    if not compat.is_cpu():
        pytest.skip("a device compiles by itself")
    made = [VLLMEngine(llama_dir, max_lora_rank=16, **COMPILED) for _ in range(2)]
    yield made
    for engine in made:
        engine.close()


class Shelf:
    """Versions, and what the trainer makes of each."""

    def __init__(self, store: AdapterStore, llama_dir: Path) -> None:
        self.store, self.model = store, tiny_lora(load_model(llama_dir), r=16)
        self.form = ServingForm(self.model, "default", torch.bfloat16)
        self.seeds: dict[int, int] = {}

    def publish(self, seed: int) -> AdapterVersion:
        refill_lora(self.model, scale=0.5, seed=seed)
        version = self.store.publish(self.form.files(), step=0)
        self.seeds[version.number] = seed
        return version

    def logprobs(self, version: AdapterVersion | None, sequences: list[list[int]]) -> list[list[float]]:
        if version is None:
            with self.model.disable_adapter():
                return teacher_logprobs(self.model, sequences)
        refill_lora(self.model, scale=0.5, seed=self.seeds[version.number])
        return teacher_logprobs(self.model, sequences)


@pytest.fixture
def shelf(llama_dir: Path, shm_dir: Path) -> Iterator[Shelf]:
    with AdapterStore(shm_dir / "store") as store:
        yield Shelf(store, llama_dir)


def config(engine: VLLMEngine) -> Any:
    return engine._llm.llm_engine.vllm_config


def check_completions(engine: VLLMEngine, shelf: Shelf, versions: list[AdapterVersion | None]) -> None:
    """Completions of a mixed batch have the log-probs that the trainer gives them under the version of each."""
    groups = engine.generate(PROMPTS, Sampling(n=2, max_tokens=12, seed=5, ignore_eos=True), adapter=versions)
    for group, version in zip(groups, versions, strict=True):
        sequences = [[*group.prompt_token_ids, *one.token_ids] for one in group.completions]
        sampled = [one.logprobs for one in group.completions]
        start = len(group.prompt_token_ids) - 1
        own = [row[start:] for row in shelf.logprobs(version, sequences)]
        others = [v for v in {*versions} if v != version]
        apart = min(
            mean_abs_difference(own, [row[start:] for row in shelf.logprobs(other, sequences)]) for other in others
        )
        assert mean_abs_difference(sampled, own) < 0.1 * apart


def operators(engine: VLLMEngine, version: AdapterVersion) -> set[str]:
    """The names of what PyTorch runs while the engine samples from a version."""
    with torch.profiler.profile() as profile:
        engine.generate(PROMPTS, Sampling(n=1, max_tokens=2), adapter=version)
    return {event.key for event in profile.key_averages()}


def test_the_model_is_compiled(engines: list[VLLMEngine], shelf: Shelf, cache: Path) -> None:
    for engine in engines:
        mode = config(engine).compilation_config.mode
        assert mode.name == "DYNAMO_TRACE_ONCE"
        assert config(engine).lora_config is not None
        assert not config(engine).model_config.enforce_eager
        version = shelf.publish(seed=4)
        engine.load(version)
        ran = operators(engine, version)
        assert OPERATOR in ran
    assert list(cache.rglob("torch_aot_compile/*")) != []


def test_every_hot_swap_arrives_in_its_own_engine(engines: list[VLLMEngine], shelf: Shelf) -> None:
    """More versions than slots, in turn; compiled code of one engine must not read the other one's slots."""
    for round_ in range(3):
        versions: list[AdapterVersion] = []
        for index, engine in enumerate(engines):
            versions.append(shelf.publish(seed=10 * round_ + index))
            assert engine.load(versions[-1]).proof == "slots"
        for engine, version in zip(engines, versions, strict=True):
            theirs = shelf.logprobs(version, PROMPTS)
            apart = mean_abs_difference(theirs, shelf.logprobs(None, PROMPTS))
            assert mean_abs_difference(engine.logprobs(PROMPTS, adapter=version), theirs) < 0.1 * apart


def test_batches_of_several_versions_and_the_base(engines: list[VLLMEngine], shelf: Shelf) -> None:
    first, second = shelf.publish(seed=1), shelf.publish(seed=2)
    for engine in engines:
        engine.load(first)
        engine.load(second)
        check_completions(engine, shelf, [first, None, second, None, second, first])
        check_completions(engine, shelf, [None, None, None, None, None, first])


def test_decoding_takes_the_compiled_kernel(
    engines: list[VLLMEngine], shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, version = engines[0], shelf.publish(seed=6)
    engine.load(version)
    rows: list[int] = []
    stock = SlotRows.add
    monkeypatch.setattr(SlotRows, "add", lambda self, y, x, scale: rows.append(len(y)) or stock(self, y, x, scale))
    engine.generate(PROMPTS, Sampling(n=1, max_tokens=3, ignore_eos=True), adapter=version)
    layers = len(compat.wrapped_modules(engine._llm))
    assert rows[-2 * layers :] == [len(PROMPTS)] * (2 * layers)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("missing", ["headers", "compiler", "cache", "right to write"])
def test_what_stands_in_the_way_of_compiling_is_said(
    missing: str, held: ExitStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The engine then starts eager, and not at all if it were compiled."""
    if not compat.is_cpu():
        pytest.skip("a device compiles by itself")
    assert starting.can_compile()
    (tmp_path / "file").touch()
    envs = importlib.import_module("vllm.envs")
    said = {
        "headers": "Python's headers are missing",
        "compiler": "PyTorch finds no program that is called 'no-such-g..'; have CXX name one",
        "cache": r"vLLM cannot keep compiled code in .*file/vllm \(Not a directory\); set VLLM_CACHE_ROOT",
        "right to write": "vLLM may not write to",
    }[missing]
    if missing == "headers":
        monkeypatch.setattr(starting.sysconfig, "get_path", lambda name: "/nowhere")
    elif missing == "compiler":
        inductor = importlib.import_module("torch._inductor.config")
        held.enter_context(inductor.patch({"cpp.cxx": (None, "no-such-g++")}))
    elif missing == "cache":
        monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path / "file" / "vllm"), raising=False)
    else:
        monkeypatch.setattr(starting.os, "access", lambda *_: False)
    with pytest.warns(RuntimeWarning, match=f"not compiled on this CPU, so decoding is slower: {said}"):
        assert not starting.can_compile()


def test_without_what_compiling_takes_the_fused_operators_are_used(
    llama_dir: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would leave them to the compiler that it does not call."""
    if not compat.is_cpu():
        pytest.skip("a device compiles by itself")
    assert starting.can_compile()
    monkeypatch.setattr(starting.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.warns(RuntimeWarning, match="Python's headers are missing"):
        engine = VLLMEngine(llama_dir, max_lora_rank=16, **COMPILED)
    try:
        assert config(engine).compilation_config.mode.name == "NONE"
        assert "all" in config(engine).compilation_config.custom_ops
        version = shelf.publish(seed=3)
        engine.load(version)
        assert OPERATOR not in operators(engine, version)
        check_completions(engine, shelf, [version, None, version, None, version, None])
    finally:
        engine.close()
