"""Random batches through vLLM's LoRA kernels: every log-prob is finite, and the trainer's.

Kernels choose their tiles by rank, width and number of rows, and a choice may be miscompiled for one GPU alone: so many
sizes, three ranks and the base, mixed as they come.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.test_parity import loud_enough
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

RANKS = (8, 16, 64)
HIDDEN = {"cpu": 128, "cuda": 1024}
BATCHES = {"cpu": 6, "cuda": 20}
ROWS = (1, 2, 5, 16, 33, 64)


@dataclass
class Hunt:
    """Trainers by the version they published, None being the base; and the base's own noise, nats per token."""

    engine: VLLMEngine
    trainers: dict[AdapterVersion | None, Any]
    noise: float
    batches: int


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hunt" in metafunc.fixturenames:
        kinds = ("eager",) if metafunc.config.getoption("--device") == "cpu" else ("eager", "graphs")
        metafunc.parametrize("hunt", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def hunt(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hunt]:
    kind = device.partition(":")[0]
    directory = tiny_model("qwen2", tmp_path_factory.mktemp("hunt"), hidden=HIDDEN[kind])
    settings = {**ENGINE_ARGS, "enforce_eager": request.param == "eager", "gpu_memory_utilization": 0.05}
    engine = VLLMEngine(directory, max_lora_rank=max(RANKS), max_loras=len(RANKS), **settings)
    base = load_model(directory).to(device)
    sequences = torch.randint(4, 260, (8, 64), generator=torch.Generator().manual_seed(1)).tolist()
    own = teacher_logprobs(base, sequences)
    noise = mean_abs_difference(engine.logprobs(sequences, adapter=None), own)
    trainers: dict[AdapterVersion | None, Any] = {None: base}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, AdapterStore(Path(folder) / "store") as store:
        for rank in RANKS:
            model = tiny_lora(load_model(directory).to(device), r=rank, seed=rank)
            refill_lora(model, scale=loud_enough(model, sequences, own, 22 * noise), seed=rank)
            version = store.publish(ServingForm(model, "default", torch.bfloat16).files(), step=rank)
            engine.load(version)
            trainers[version] = model
        yield Hunt(engine, trainers, noise, BATCHES[kind])
    engine.close()


def test_prompts_of_all_sizes(hunt: Hunt, record_property: Callable[[str, Any], None]) -> None:
    """Each batch is of one version, from one short row to thousands of tokens at once."""
    draw = random.Random(0)
    worst = 0.0
    for _ in range(hunt.batches):
        sequences = [tokens(draw, draw.randint(2, 120)) for _ in range(draw.choice(ROWS))]
        for version, trainer in hunt.trainers.items():
            served = hunt.engine.logprobs(sequences, adapter=version)
            worst = max(worst, excess(served, teacher_logprobs(trainer, sequences), hunt.noise))
    record_property("noise_nats", round(hunt.noise, 5))
    record_property("worst_share_of_allowed", round(worst, 3))
    assert worst <= 1


def test_mixed_batches_of_all_sizes(hunt: Hunt, record_property: Callable[[str, Any], None]) -> None:
    """Rows of all versions and of the base decode beside each other, leaving one by one."""
    draw = random.Random(1)
    worst = 0.0
    for batch in range(hunt.batches):
        rows = draw.choice(ROWS)
        prompts = [tokens(draw, draw.randint(1, 60)) for _ in range(rows)]
        asked = [draw.choice(list(hunt.trainers)) for _ in range(rows)]
        groups = hunt.engine.generate(prompts, Sampling(max_tokens=24, seed=batch), adapter=asked)
        for version, trainer in hunt.trainers.items():
            made = [(g.prompt_token_ids, g.completions[0]) for g, v in zip(groups, asked, strict=True) if v == version]
            if not made:
                continue
            own = teacher_logprobs(trainer, [[*ids, *completion.token_ids] for ids, completion in made])
            tails = [row[-len(c.token_ids) :] for row, (_, c) in zip(own, made, strict=True)]
            worst = max(worst, excess([c.logprobs for _, c in made], tails, hunt.noise))
    record_property("worst_share_of_allowed", round(worst, 3))
    assert worst <= 1


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(4, 260) for _ in range(count)]


def excess(served: Sequence[Sequence[float]], own: Sequence[Sequence[float]], noise: float) -> float:
    """Mean difference over what it may be, infinite for NaN: three times the noise, and more of a mean of few tokens.

    An adapter left out, mixed up or mis-scaled moves it by more than ten times the noise.
    """
    count = sum(map(len, served))
    gap = mean_abs_difference(served, own)
    return gap / (noise * (3 + 8 / math.sqrt(count))) if math.isfinite(gap) else math.inf
