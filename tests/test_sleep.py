"""Sleep mode's logic on real vLLM. Its CPU worker ignores the call, so the tests do to memory what a GPU's would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.delivery.slots import SlotProver
from lora_grpo.engines.local import running
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, DeliveryError, EngineError
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, refill_lora, tiny_lora

pytestmark = pytest.mark.vllm

PROMPT = list(range(100, 112))
GREEDY = Sampling(max_tokens=8, temperature=0.0)
MODULE = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def started(llama_dir: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(llama_dir, max_lora_rank=8, **ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.fixture
def engine(started: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMEngine]:
    """Alone in its process, and started with a sleep mode, for all it knows."""
    monkeypatch.setattr(running, "engines_alive", lambda: 1)
    monkeypatch.setattr(started._llm.llm_engine.vllm_config.model_config, "enable_sleep_mode", True)
    yield started
    started.wake_up()
    for version in started.loaded():
        started.unload(version)


@pytest.fixture
def versions(llama_dir: Path, shm_dir: Path) -> Iterator[list[AdapterVersion]]:
    """Three that differ; the engine has two slots."""
    model = tiny_lora(load_model(llama_dir), r=8)
    form = ServingForm(model, "default", torch.bfloat16)
    with AdapterStore(shm_dir / "store") as store:
        published = []
        for seed in range(3):
            refill_lora(model, scale=0.3, seed=seed)
            published.append(store.publish(form.files(), step=seed))
        yield published


def answers(engine: VLLMEngine, versions: list[AdapterVersion]) -> list[Any]:
    return [engine.generate([PROMPT], GREEDY, adapter=adapter)[0].completions for adapter in (None, *versions)]


def test_every_loaded_version_is_proven_before_it_can_be_sampled(
    engine: VLLMEngine, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in versions:
        engine.load(version)
    before, order = answers(engine, versions), engine.loaded()
    proven: list[AdapterVersion] = []
    prove = SlotProver.prove

    def noted(self: SlotProver, version: AdapterVersion, *args: Any) -> int:
        proven.append(version)
        return prove(self, version, *args)

    monkeypatch.setattr(SlotProver, "prove", noted)
    engine.sleep()
    assert engine._llm.llm_engine.is_sleeping()
    engine.wake_up()
    assert not engine._llm.llm_engine.is_sleeping()
    assert tuple(proven) == order == engine.loaded()
    assert answers(engine, versions) == before


def test_asleep_it_can_only_be_woken_closed_or_relieved(engine: VLLMEngine, versions: list[AdapterVersion]) -> None:
    first, second, _ = versions
    engine.load(first)
    engine.sleep()
    for use in (
        lambda: engine.generate([PROMPT], GREEDY, adapter=first),
        lambda: engine.generate([PROMPT], GREEDY, adapter=None),
        lambda: engine.logprobs([PROMPT], adapter=None),
        lambda: engine.load(first),
        lambda: engine.load(second),
        engine.describe_base,
        engine.shared_model,
        engine.sleep,
    ):
        with pytest.raises(EngineError, match=r"the engine sleeps; call wake_up\(\) first"):
            use()
    engine.unload(first)
    engine.wake_up()
    assert engine.loaded() == ()
    engine.load(second)
    assert engine.generate([PROMPT], GREEDY, adapter=second)[0].completions[0].version == 2


def test_a_version_that_did_not_survive_is_not_served_and_the_others_are(
    engine: VLLMEngine, versions: list[AdapterVersion]
) -> None:
    first, second, _ = versions
    engine.load(first)
    engine.load(second)
    before = answers(engine, [second])
    slot = compat.slot_of(engine._llm, engine._find(first).request.lora_int_id)
    engine.sleep()
    compat.wrapped_modules(engine._llm)[MODULE].lora_b_stacked[0][slot].mul_(0.5)
    with pytest.raises(DeliveryError, match=rf"v1: .*{MODULE}.* differs from the published bytes"):
        engine.wake_up()
    assert engine.loaded() == (second,)
    assert answers(engine, [second]) == before
    engine.load(first)


def test_ctrl_c_while_waking_leaves_nothing_unproven_to_sample(
    engine: VLLMEngine, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = versions
    engine.load(first)
    engine.load(second)
    engine.sleep()

    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SlotProver, "prove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.wake_up()
    assert engine.loaded() == ()
    engine.load(first)
    assert engine.generate([PROMPT], GREEDY, adapter=first)[0].completions[0].version == 1


# Level 2


def discard(engine: VLLMEngine) -> None:
    """What level 2 leaves of a weight: anything."""
    weights = dict(compat.base_parameters(engine._llm))
    with torch.inference_mode():
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            weights[name].data.zero_()


def test_level_2_is_refused_with_adapters_where_it_loses_them(
    engine: VLLMEngine, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(versions[0])
    engine.load(versions[1])
    for release in compat.RELEASES:
        monkeypatch.setattr(compat, "vllm_release", lambda release=release: release)
        if release < (0, 28):
            with pytest.raises(ConfigError, match=rf"on vLLM {release[0]}\.{release[1]} has no way back: .*level 1"):
                engine.sleep(level=2)
        elif release < (0, 33):
            with pytest.raises(ConfigError, match=rf"level 2 on vLLM {release[0]}\.{release[1]} .*\(v1, v2 loaded\)"):
                engine.sleep(level=2)
        else:
            engine.sleep(level=2)
            engine.wake_up()
    assert engine.loaded() == (versions[0], versions[1])


def test_level_2_reads_the_base_again_and_then_the_adapters(
    engine: VLLMEngine, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the base again makes vLLM forget its adapters, from 0.28 on: the installed release does it too."""
    monkeypatch.setattr(compat, "vllm_release", lambda: (0, 33))
    for version in versions:
        engine.load(version)
    before = answers(engine, versions)
    engine.sleep(level=2)
    discard(engine)
    engine.wake_up()
    assert set(engine.loaded()) == set(versions)
    assert answers(engine, versions) == before


def test_without_adapters_level_2_is_open_to_releases_that_read_the_base_again(
    engine: VLLMEngine, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(compat, "vllm_release", lambda: (0, 27))
        with pytest.raises(ConfigError, match=r"level 2 on vLLM 0\.27 has no way back"):
            engine.sleep(level=2)
    before = answers(engine, [])
    engine.sleep(level=2)
    discard(engine)
    engine.wake_up()
    assert answers(engine, []) == before
    engine.load(versions[0])


# Refused


def test_there_is_no_sleep_mode_on_the_cpu(
    started: VLLMEngine, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="enable_sleep_mode=True: vLLM sleeps on GPUs only"):
        VLLMEngine(llama_dir, enable_sleep_mode=True, **ENGINE_ARGS)
    with pytest.raises(ConfigError, match=r"not started with enable_sleep_mode=True \(GPUs only\)"):
        started.sleep()
    assert answers(started, [])


def test_levels_shared_weights_requests_and_neighbours(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no sleep level 3: use 1"):
        engine.sleep(level=3)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_shared", object())
        with pytest.raises(ConfigError, match=r"the trainer shares; .*share_base_weights=False"):
            engine.sleep()
    with monkeypatch.context() as patched:
        patched.setattr(engine._llm.llm_engine, "has_unfinished_requests", lambda: True)
        with pytest.raises(ConfigError, match="the engine is answering requests"):
            engine.sleep()
    with monkeypatch.context() as patched:
        patched.setattr(running, "engines_alive", lambda: 2)
        with pytest.raises(ConfigError, match="2 engines are alive in this process"):
            engine.sleep()
    assert not engine._llm.llm_engine.is_sleeping()
    assert answers(engine, [])


# Failures: these close the engine, so each has its own


def test_a_base_that_does_not_come_back_closes_the_engine(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLMEngine(llama_dir, max_lora_rank=8, **ENGINE_ARGS)
    monkeypatch.setattr(running, "engines_alive", lambda: 1)
    monkeypatch.setattr(engine._llm.llm_engine.vllm_config.model_config, "enable_sleep_mode", True)
    engine.sleep()
    discard(engine)
    with pytest.raises(DeliveryError, match="after sleep level 1 the base is not the same"):
        engine.wake_up()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.generate([PROMPT], GREEDY, adapter=None)


def test_a_failure_inside_vllm_closes_the_engine(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have unmapped some of the memory; whatever touched that would end the process."""
    engine = VLLMEngine(llama_dir, max_lora_rank=8, **ENGINE_ARGS)
    monkeypatch.setattr(running, "engines_alive", lambda: 1)
    monkeypatch.setattr(engine._llm.llm_engine.vllm_config.model_config, "enable_sleep_mode", True)

    def half_way(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Memory usage increased after sleeping.")

    monkeypatch.setattr(engine._llm, "sleep", half_way)
    with pytest.raises(EngineError, match="vLLM could not fall asleep: AssertionError: Memory usage increased"):
        engine.sleep()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.wake_up()
