"""Rollback over HTTP, where no slot can be read: the servers are told what the version has to answer, or nothing moves.

The servers are fakes that compute with a model of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_grpo.adapters.peft_form.checks import active_adapter
from lora_grpo.adapters.peft_form.modules import lora_modules
from lora_grpo.adapters.peft_form.serving import assign_rounded
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import WEIGHTS_FILE
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.errors import DeliveryError, StoreError
from lora_grpo.grpo.forward import teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.population.population import hold
from tests.fake_vllm import FakeServer
from tests.tiny_models import load_model, refill_lora, tiny_lora
from tests.tiny_trainer import same


@dataclass
class ModelServer(FakeServer):
    """Scores prompts with a model; `wrong` are the files that it serves wrong weights from."""

    wrong: Path = Path()

    def __post_init__(self) -> None:
        self._model = tiny_lora(load_model(self.root), r=8)
        self._modules = lora_modules(self._model, active_adapter(self._model))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = super()._answer(body)
        if "prompt_logprobs" in body:
            scored = zip(body["prompt"][1:], self._scores(body["model"], body["prompt"]), strict=True)
            answer["choices"][0]["prompt_logprobs"] = [None, *({str(t): {"logprob": v}} for t, v in scored)]
        return answer

    def _scores(self, name: str, ids: list[int]) -> list[float]:
        if name == "base":
            with self._model.disable_adapter():
                return teacher_logprobs(self._model, [ids])[0]
        path = self.wrong if self.weights[name] == "wrong" else Path(self.adapters[name])
        assign_rounded(load_file(path / WEIGHTS_FILE), self._modules)
        return teacher_logprobs(self._model, [ids])[0]


@pytest.fixture
def servers(llama_dir: Path) -> Iterator[list[ModelServer]]:
    with ExitStack() as running:
        yield [running.enter_context(ModelServer(str(llama_dir))) for _ in range(2)]


@pytest.fixture
def sync(llama_dir: Path, servers: list[ModelServer], shm_dir: Path) -> Iterator[NativeSync]:
    """A run of three versions, the last two of which are in use."""
    engine = VLLMServerEngine([server.url for server in servers], patience_s=3.0)
    with AdapterStore(shm_dir / "run") as store:
        sync = NativeSync(tiny_lora(load_model(llama_dir), r=8), engine, store)
        for step in range(3):
            refill_lora(sync.model, seed=step)  # type: ignore[arg-type]
            sync.push(step)
        yield sync
        sync.close()
        engine.close()


def weights(sync: NativeSync) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in sync.model.state_dict().items() if "lora_" in name}


def used(sync: NativeSync) -> list[int]:
    return [version.number for version in sync.engine.loaded()]


def test_a_version_that_is_no_longer_in_use_is_proven_as_a_new_one(
    sync: NativeSync, servers: list[ModelServer]
) -> None:
    assert used(sync) == [2, 3]
    sync.rollback(1)
    assert (sync.head.number, used(sync)) == (1, [3, 1])
    refilled = tiny_lora(load_model(servers[0].root), r=8)
    refill_lora(refilled, seed=0)
    for name, value in refilled.state_dict().items():
        if "lora_" in name:
            torch.testing.assert_close(sync.model.state_dict()[name], value, rtol=2**-7, atol=1e-6)


def test_servers_that_are_wrong_alike_are_not_believed(sync: NativeSync, servers: list[ModelServer]) -> None:
    for server in servers:
        server.wrong_weights, server.wrong = 100, sync.head.path
    before = weights(sync)
    with pytest.raises(DeliveryError, match="v1 failed on 2 of 2 replicas"):
        sync.rollback(1)
    assert (sync.head.number, used(sync)) == (3, [2, 3])
    assert same(weights(sync), before)


def test_a_version_that_another_run_pushed_out_is_proven_again(
    sync: NativeSync, servers: list[ModelServer], shm_dir: Path
) -> None:
    with AdapterStore(shm_dir / "other") as store:
        other = NativeSync(tiny_lora(load_model(servers[0].root), r=8), sync.engine, store)
        runs: list[Any] = [SimpleNamespace(sync=one, version=sync.head) for one in (sync, other)]

        def push_out() -> None:
            for step in range(2):
                refill_lora(other.model, seed=8 + step)  # type: ignore[arg-type]
                other.push(step)
            assert sync.head not in sync.engine.loaded()
            runs[1].version = other.head

        push_out()
        hold(sync.engine, runs)
        assert {*sync.engine.loaded()} == {sync.head, other.head}
        push_out()
        for server in servers:
            server.wrong_weights, server.wrong = 100, other.head.path
        with pytest.raises(DeliveryError, match="v3 failed on 2 of 2 replicas"):
            hold(sync.engine, runs)
        other.close()


def test_what_the_new_one_pushed_out_is_proven_again_when_the_rollback_fails(
    sync: NativeSync, servers: list[ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise StoreError("no promotion today")

    before = weights(sync)
    monkeypatch.setattr(sync.store, "promote", failing)
    with pytest.raises(StoreError, match="no promotion today"):
        sync.rollback(1)
    assert (sync.head.number, used(sync)) == (3, [2, 3])
    assert same(weights(sync), before)
