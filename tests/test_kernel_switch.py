"""`cpu_lora_kernels`: two engines in one process, one with our CPU kernels and one with vLLM's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.local import lora_kernels
from lora_grpo.engines.local.lora_kernels import LayerKernels
from lora_grpo.engines.requests import scored_tokens, scoring_params
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Sampling
from tests.tiny_models import VOCAB, load_model, refill_lora, tiny_lora

pytestmark = pytest.mark.vllm

CHUNKED = {
    "max_lora_rank": 16,
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
}
"""Prompts of more than 64 tokens reach the kernels in several batches."""


@pytest.fixture(scope="module")
def engines(llama_dir: Path) -> Iterator[tuple[VLLMEngine, VLLMEngine]]:
    """Ours, started first, and vLLM's."""
    if not compat.is_cpu():
        pytest.skip("these kernels are the CPU's")
    ours = VLLMEngine(llama_dir, **CHUNKED)
    stock = VLLMEngine(llama_dir, cpu_lora_kernels=False, **CHUNKED)
    yield ours, stock
    stock.close()
    ours.close()


@pytest.fixture
def versions(
    engines: tuple[VLLMEngine, VLLMEngine], llama_dir: Path, shm_dir: Path
) -> Iterator[tuple[AdapterVersion, AdapterVersion]]:
    """Two, of ranks 16 and 4, loaded by both engines."""
    with AdapterStore(shm_dir / "store") as store:
        made = []
        for seed, rank in enumerate((16, 4)):
            model = tiny_lora(load_model(llama_dir), r=rank)
            refill_lora(model, scale=0.3, seed=seed)
            made.append(store.publish(ServingForm(model, "default", torch.bfloat16).files(), step=seed))
        for engine in engines:
            for version in made:
                engine.load(version)
        yield made[0], made[1]
        for engine in engines:
            for version in made:
                engine.unload(version)


def linear_kernels(engine: VLLMEngine) -> set[type]:
    """What the linear layers of an engine compute their LoRA with."""
    return {type(layer.punica_wrapper) for layer in compat.wrapped_modules(engine._llm).values()}


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def logprobs(
    engine: VLLMEngine, rows: Sequence[list[int]], adapters: Sequence[AdapterVersion | None]
) -> list[list[float]]:
    """Of every token of `rows`, each under its own version, as they come in the engine's own batches."""
    params: Any = scoring_params()
    asked = [(ids, params, version) for ids, version in zip(rows, adapters, strict=True)]
    return scored_tokens(engine._run(asked), rows)


def test_each_engine_has_the_kernels_that_it_was_started_with(engines: tuple[VLLMEngine, VLLMEngine]) -> None:
    ours, stock = engines
    assert linear_kernels(ours) == {LayerKernels}
    assert LayerKernels not in linear_kernels(stock)
    assert (ours._mixes_base, stock._mixes_base) == (True, compat.base_rows_are_safe())


def test_they_agree_on_chunks_of_several_versions(
    engines: tuple[VLLMEngine, VLLMEngine], versions: tuple[AdapterVersion, AdapterVersion]
) -> None:
    ours, stock = engines
    first, second = versions
    rows, adapters = prompts(150, 40, 200, 90), [first, second, first, second]
    own, theirs = logprobs(ours, rows, adapters), logprobs(stock, rows, adapters)
    swapped = logprobs(ours, rows, [second, first, second, first])
    base = logprobs(ours, rows, [None] * len(rows))
    for row in range(len(rows)):
        off = mean_abs_difference([own[row]], [theirs[row]])
        assert off < 0.1 * mean_abs_difference([own[row]], [base[row]])
        assert off < 0.1 * mean_abs_difference([own[row]], [swapped[row]])


def test_vllms_own_keep_base_rows_apart(
    engines: tuple[VLLMEngine, VLLMEngine],
    versions: tuple[AdapterVersion, AdapterVersion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before 0.33 they give base rows of a mixed batch the last slot's adapter."""
    _, stock = engines
    asked = [None, *versions, None]

    def tokens(rows: list[list[int]], adapters: list[AdapterVersion | None]) -> list[tuple[int, ...]]:
        groups = stock.generate(rows, Sampling(max_tokens=8, temperature=0.0), adapter=adapters)
        return [group.completions[0].token_ids for group in groups]

    prompt = list(range(100, 112))
    alone = [tokens([prompt], [adapter])[0] for adapter in asked]
    assert tokens([prompt] * 4, asked) == alone
    monkeypatch.setattr(stock, "_mixes_base", True)
    mixed = tokens([prompt] * 4, asked)
    assert compat.base_rows_are_safe() or mixed != alone, "the case that this test is about did not arise"


def test_slots_of_another_dtype_are_left_to_vllm(llama_dir: Path, shm_dir: Path) -> None:
    """Plain products need both sides in one dtype; vLLM's own kernels convert."""
    if not compat.is_cpu():
        pytest.skip("these kernels are the CPU's")
    engine = VLLMEngine(llama_dir, **{**CHUNKED, "enforce_eager": False, "dtype": "float32", "lora_dtype": "bfloat16"})
    try:
        assert LayerKernels not in linear_kernels(engine)
        model = tiny_lora(load_model(llama_dir), r=8, scale=0.3)
        rows = prompts(30, 40)
        with AdapterStore(shm_dir / "store") as store:
            version = store.publish(ServingForm(model, "default", torch.bfloat16).files(), step=0)
            engine.load(version)
            served = engine.logprobs(rows, adapter=version)
        with model.disable_adapter():
            base = teacher_logprobs(model, rows)
        expected = teacher_logprobs(model, rows)
        assert mean_abs_difference(served, expected) < 0.05 * mean_abs_difference(expected, base)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("is_cpu", "release", "applies"), [(True, (0, 33), True), (True, (0, 31), False), (False, (0, 33), False)]
)
def test_ours_are_for_the_cpu_and_for_releases_that_they_were_tested_with(
    is_cpu: bool, release: tuple[int, int], applies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "is_cpu", lambda: is_cpu)
    monkeypatch.setattr(compat, "vllm_release", lambda: release)
    assert lora_kernels.applies() is applies
