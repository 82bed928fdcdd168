"""Loading straight from the mapped file: the same slots, the same vLLM state as its own loader leaves."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.local import residents
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import DeliveryError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.kernels import Cast, Copies
from lora_grpo.types import Sampling
from tests.tiny_models import VOCAB, load_model, refill_lora, tiny_lora

pytestmark = pytest.mark.vllm

SEQUENCES = [list(range(20 + row, 60 + row)) for row in range(3)]
ADAPTERS: dict[str, dict[str, Any]] = {
    "slot's rank": {"r": 16},
    "lower rank": {"r": 4},
    "attention": {"r": 8, "targets": "attention"},
    "part of a fused layer": {"r": 8, "targets": ["q_proj", "v_proj", "up_proj"]},
    "ranks by module": {"r": 8, "rank_pattern": {"q_proj": 16, "down_proj": 1}, "use_rslora": True},
}


@pytest.fixture
def engine(llama_engine: VLLMEngine) -> Iterator[VLLMEngine]:
    for version in llama_engine.loaded():
        llama_engine.unload(version)
    yield llama_engine
    for version in llama_engine.loaded():
        llama_engine.unload(version)


@pytest.fixture
def store(shm_dir: Path) -> Iterator[AdapterStore]:
    with AdapterStore(shm_dir / "store") as opened:
        yield opened


def publish(store: AdapterStore, llama_dir: Path, seed: int = 0, **settings: Any) -> tuple[AdapterVersion, Any]:
    model = tiny_lora(load_model(llama_dir), scale=0.5, seed=seed, **settings)
    return store.publish(ServingForm(model, "default", torch.bfloat16).files(), step=0), model


def slots(engine: VLLMEngine, version: AdapterVersion) -> dict[str, torch.Tensor]:
    slot = compat.slot_of(engine._llm, engine._find(version).request.lora_int_id)
    return {
        f"{name}[{index}].{kind}": stacked[slot].clone()
        for name, layer in compat.wrapped_modules(engine._llm).items()
        for kind, stacks in (("A", layer.lora_a_stacked), ("B", layer.lora_b_stacked))
        for index, stacked in enumerate(stacks)
    }


def as_seen(adapter: Any) -> dict[str, Any]:
    """A registered adapter as vLLM's own code reads it."""

    def plain(value: Any) -> Any:
        return [None if v is None else v.tolist() for v in value] if isinstance(value, list) else value.tolist()

    return {
        name: (type(lora).__name__, lora.rank, lora.scaling, plain(lora.lora_a), plain(lora.lora_b))
        for name, lora in adapter.loras.items()
    }


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_slots_and_registration_are_those_of_vllms_own_loader(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Slots were filled before by an adapter of other modules and ranks: what it left must be gone."""
    dirty = [publish(store, llama_dir, seed, r=16)[0] for seed in (7, 8)]
    version, _ = publish(store, llama_dir, **settings)
    left, seen = {}, {}
    for kind in ("stock", "direct"):
        monkeypatch.setattr(engine._residents, "_loader", kind)
        for other in dirty:
            engine.load(other)
        receipt = engine.load(version)
        assert (receipt.proof, receipt.loader) == ("slots", kind)
        left[kind] = slots(engine, version)
        lora_id = engine._find(version).request.lora_int_id
        seen[kind] = as_seen(compat.lora_manager(engine._llm).get_adapter(lora_id))
        for other in (*dirty, version):
            engine.unload(other)
    assert left["stock"].keys() == left["direct"].keys()
    assert all(torch.equal(left["stock"][name], left["direct"][name]) for name in left["stock"])
    assert any(tensor.any() for tensor in left["direct"].values())
    ranks = {name: entry[1] for name, entry in seen["direct"].items()}
    assert {name: (*e[:1], *e[2:]) for name, e in seen["stock"].items()} == {
        name: (*e[:1], *e[2:]) for name, e in seen["direct"].items()
    }
    assert set(ranks.values()) <= {1, 4, 8, 16}


def test_the_engine_computes_what_the_trainer_does(engine: VLLMEngine, store: AdapterStore, llama_dir: Path) -> None:
    for seed, settings in enumerate(ADAPTERS.values()):
        version, model = publish(store, llama_dir, seed, **settings)
        assert engine.load(version).loader == "direct"
        ours = engine.logprobs(SEQUENCES, adapter=version)
        theirs = teacher_logprobs(model, SEQUENCES)
        with model.disable_adapter():
            base = teacher_logprobs(model, SEQUENCES)
        assert mean_abs_difference(ours, theirs) < 0.1 * mean_abs_difference(theirs, base)


def test_least_recently_used_goes_first_and_vllm_agrees(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path
) -> None:
    versions = [publish(store, llama_dir, seed)[0] for seed in range(6)]
    for version in versions[:4]:
        engine.load(version)
    engine.generate([[5, 6]], Sampling(max_tokens=2, seed=0), adapter=versions[0])
    engine.load(versions[4])
    assert set(engine.loaded()) == {versions[i] for i in (0, 2, 3, 4)}
    manager = compat.lora_manager(engine._llm)
    ids = {engine._find(version).request.lora_int_id for version in engine.loaded()}
    assert set(engine._llm.llm_engine.list_loras()) == ids == set(manager.list_adapters())
    active = [lora_id for lora_id in manager.lora_index_to_id if lora_id is not None]
    assert set(active) == set(manager._active_adapters) <= ids
    assert len(active) == 2


def test_vllm_itself_can_activate_what_was_loaded_directly(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path
) -> None:
    """An adapter that lost its slot behind our back is put into one by vLLM's own code, from the registered tensors."""
    versions = [publish(store, llama_dir, seed)[0] for seed in range(3)]
    for version in versions:
        engine.load(version)
    before = slots(engine, versions[2])
    lora_id = engine._find(versions[2]).request.lora_int_id
    manager = compat.lora_manager(engine._llm)
    manager.deactivate_adapter(lora_id)
    assert manager.activate_adapter(lora_id)
    assert all(torch.equal(tensor, slots(engine, versions[2])[name]) for name, tensor in before.items())
    engine.load(versions[2])


def test_a_version_returns_to_a_slot_after_its_files_are_gone(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path
) -> None:
    versions = [publish(store, llama_dir, seed)[0] for seed in range(3)]
    for version in versions:
        engine.load(version)
    answers = [engine.logprobs(SEQUENCES, adapter=version) for version in versions]
    for version in versions:
        shutil.rmtree(version.path)
    assert [engine.logprobs(SEQUENCES, adapter=version) for version in versions] == answers


def test_a_thousand_bytes_changed_after_publishing_are_noticed(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path
) -> None:
    version, _ = publish(store, llama_dir)
    weights = version.path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.chmod(0o600)
    weights.write_bytes(content)
    with pytest.raises(DeliveryError, match="not the ones that were published"):
        engine.load(version)
    assert engine.loaded() == ()
    assert not engine._llm.llm_engine.list_loras()


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_what_the_trainer_holds_gets_into_the_slot_without_reading_the_file_back(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    model = tiny_lora(load_model(llama_dir).to(engine.device), scale=0.5, **settings)
    form = ServingForm(model, "default", torch.bfloat16)
    version = store.publish(form.files(), step=0)
    engine.load(version)
    from_file, answers = slots(engine, version), engine.logprobs(SEQUENCES, adapter=version)
    engine.unload(version)
    for seed in (7, 8):
        engine.load(publish(store, llama_dir, seed, r=16)[0])
    monkeypatch.setattr(
        "lora_grpo.engines.local.residents.require_published", lambda *_, **__: pytest.fail("read back")
    )
    receipt = engine.load(version, held=form.held)
    assert (receipt.proof, receipt.proven_bytes, receipt.loader) == ("slots", form.nbytes, "direct")
    assert all(torch.equal(tensor, slots(engine, version)[name]) for name, tensor in from_file.items())
    assert engine.logprobs(SEQUENCES, adapter=version) == answers


def test_a_sync_is_one_cast_one_copy_and_no_layer(
    llama_dir: Path, engine: VLLMEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes it fast is what happens where slots have the adapter's rank."""
    if not compat.is_cpu():
        pytest.skip("a device has copies of its own")
    ran: list[str] = []
    for one in (Cast, Copies):
        stock = one.run
        monkeypatch.setattr(
            one, "run", lambda self, *args, stock=stock, name=one.__name__: ran.append(name) or stock(self, *args)
        )
    monkeypatch.setattr(residents.LayersOnDemand, "__getitem__", lambda *_: pytest.fail("vLLM asked for a layer"))
    form = ServingForm(tiny_lora(load_model(llama_dir), r=16), "default", torch.bfloat16)
    for step in range(4):
        engine.load(store.publish(form.files(), step=step), held=form.held)
    assert ran == ["Cast", "Copies"] * 4


def test_held_tensors_of_another_version_are_refused(engine: VLLMEngine, store: AdapterStore, llama_dir: Path) -> None:
    """One bit of one tensor: the trainer took a step between publishing and loading."""
    model = tiny_lora(load_model(llama_dir).to(engine.device))
    form = ServingForm(model, "default", torch.bfloat16)
    served, version = store.publish(form.files(), step=0), store.publish(form.files(), step=1)
    engine.load(served, held=form.held)
    form.held[-1].view(torch.int16)[-1, -1] ^= 1
    with pytest.raises(DeliveryError, match="differs from the published bytes"):
        engine.load(version, held=form.held)
    assert engine.loaded() == (served,)
    engine.load(served)
    assert len(engine._llm.llm_engine.list_loras()) == 1


def test_a_file_that_changed_under_a_held_load_is_noticed_when_it_is_read(
    engine: VLLMEngine, store: AdapterStore, llama_dir: Path
) -> None:
    form = ServingForm(tiny_lora(load_model(llama_dir).to(engine.device)), "default", torch.bfloat16)
    version = store.publish(form.files(), step=0)
    engine.load(version, held=form.held)
    weights = version.path / "adapter_model.safetensors"
    weights.chmod(0o600)
    with open(weights, "r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    engine.logprobs(SEQUENCES, adapter=version)
    for seed in (1, 2):
        engine.load(publish(store, llama_dir, seed)[0])
    with pytest.raises(DeliveryError, match="differs from the published bytes"):
        engine.logprobs(SEQUENCES, adapter=version)
    assert version not in engine.loaded()


def test_nothing_of_an_unloaded_version_stays_mapped(engine: VLLMEngine, store: AdapterStore, llama_dir: Path) -> None:
    """Each held mapping keeps the tmpfs pages of a version that was pruned: memory that grows with every sync."""

    def mapped() -> int:
        gc.collect()
        return sum(str(store.root) in line for line in Path("/proc/self/maps").read_text().splitlines())

    model = tiny_lora(load_model(llama_dir), r=8)
    form = ServingForm(model, "default", torch.bfloat16)
    for seed in range(12):
        refill_lora(model, seed=seed)
        engine.load(store.publish(form.files(), step=seed))
    held = len([line for line in Path("/proc/self/maps").read_text().splitlines() if "adapter_model" in line])
    assert 0 < held <= 2 * len(engine.loaded())
    for version in engine.loaded():
        engine.unload(version)
    assert mapped() == 0


def test_a_long_prompt_in_chunks_and_mixed_with_others(llama_dir: Path, store: AdapterStore) -> None:
    """Chunked prefill: one prompt reaches the kernels in several batches, beside other versions and the base."""
    engine = VLLMEngine(
        llama_dir,
        max_lora_rank=8,
        max_model_len=256,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
    )
    try:
        (first, one), (second, two) = (publish(store, llama_dir, seed) for seed in (1, 2))
        engine.load(first)
        engine.load(second)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (150, 40, 200)]
        for adapter, model in ((first, one), (second, two)):
            own = engine.logprobs(rows, adapter=adapter)
            expected = teacher_logprobs(model, rows)
            with model.disable_adapter():
                base = teacher_logprobs(model, rows)
            assert mean_abs_difference(own, expected) < 0.1 * mean_abs_difference(expected, base)
        groups = engine.generate(rows, Sampling(max_tokens=8, temperature=0.0), adapter=[first, None, second])
        for group, row, adapter in zip(groups, rows, (first, None, second), strict=True):
            alone = engine.generate([row], Sampling(max_tokens=8, temperature=0.0), adapter=adapter)[0]
            together = [*row, *group.completions[0].token_ids]
            scored = engine.logprobs([together], adapter=adapter)[0][-len(group.completions[0].token_ids) :]
            assert mean_abs_difference([scored], [list(group.completions[0].logprobs)]) < 0.05
            assert alone.completions[0].version == group.completions[0].version
    finally:
        engine.close()
