"""Every public name explains itself: a docstring with an example that runs, on a tiny base and mostly a fake engine."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lora_grpo
from lora_grpo import AdapterStore, FakeEngine, GRPOTrainer, ModelConfig, NativeSync, Population, VLLMServerEngine
from lora_grpo.errors import LoraGrpoError
from tests.fake_vllm import FakeServer
from tests.tiny_models import load_model, tiny_lora
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, share_of_low_bytes

WITHOUT_EXAMPLE = {
    "Engine": "a protocol, which `FakeEngine`, `VLLMEngine` and `VLLMServerEngine` show",
    "push_to_hub": "it uploads; test_export runs it against a stand-in of the hub",
    **{
        name: "an error, which is raised, not made; examples/docs/troubleshooting.md explains each"
        for name in lora_grpo.__all__
        if isinstance(value := getattr(lora_grpo, name), type) and issubclass(value, LoraGrpoError)
    },
}
SMALL = {name: getattr(CONFIG, name) for name in ("generation_batch_size", "num_generations", "max_completion_length")}
SMALL |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SMALL |= {"vllm_importance_sampling_correction": False}


@pytest.fixture
def names(
    llama_dir: Path, tmp_path: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[dict[str, Any]]:
    """What examples may name: everything public on a tiny base, and what the README's loop has."""
    monkeypatch.chdir(tmp_path)
    base, model = ModelConfig(name=str(llama_dir), dtype="float32"), tiny_lora(load_model(llama_dir), r=8)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    engine = FakeEngine(lambda prompt, version, seed: "42")

    def trainer(_: Any, reward: Any, config: Any, rows: Any, **given: Any) -> GRPOTrainer:
        fake = fake_engine(llama_dir)
        return GRPOTrainer(base, reward, config.replace(**SMALL), rows, engine=fake, view=False, **given)

    def population(_: Any, members: list[Any]) -> Population:
        small = [replace(member, config=member.config.replace(**SMALL)) for member in members]
        return Population(base, small, engine=fake_engine(llama_dir))

    with ExitStack() as open_now:

        def served(_: Any) -> VLLMServerEngine:
            return VLLMServerEngine([open_now.enter_context(FakeServer(str(llama_dir))).url])

        store = open_now.enter_context(AdapterStore(shm_dir / "store", archive="runs/mine"))
        sync = NativeSync(model, engine, store, optimizer=optimizer)
        store.record(sync.push(step=0), reward=0.5)
        store.record(version := sync.push(step=1), reward=0.7)
        store.flush()
        yield {
            **{name: getattr(lora_grpo, name) for name in lora_grpo.__all__},
            **{"base": str(llama_dir), "model": model, "optimizer": optimizer, "engine": engine, "store": store},
            **{"sync": sync, "version": version, "rows": ROWS, "reward": share_of_low_bytes},
            "lora": LoraConfig(r=8, target_modules="all-linear"),
            "GRPOTrainer": trainer,
            "Population": population,
            "VLLMServerEngine": served,
            "VLLMEngine": lambda *_, **__: request.getfixturevalue("llama_engine"),
        }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.vllm] if name == "VLLMEngine" else [])
        for name in lora_grpo.__all__
        if name not in WITHOUT_EXAMPLE
    ],
)
def test_the_example_of_a_public_name_runs(name: str, names: dict[str, Any]) -> None:
    [test] = doctest.DocTestFinder(recurse=False).find(getattr(lora_grpo, name), name, globs=names)
    assert 1 <= len(test.examples) <= 6
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert failed.failed == 0


def test_names_without_an_example_are_documented_names() -> None:
    assert all((getattr(lora_grpo, name).__doc__ or "").strip() for name in lora_grpo.__all__)
    assert set(WITHOUT_EXAMPLE) <= {*lora_grpo.__all__}
