"""One copy of the base: the trainer's model on the engine's weights computes, learns and refuses as it should."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines import compat
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.engines.local import weights as own_weights
from lora_grpo.engines.local.targets import linear_leaves
from lora_grpo.engines.local.weights import FrozenParameter, SharedBase, check_shareable
from lora_grpo.engines.names import NameMap
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, DeliveryError, UnsupportedAdapter
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import assembly
from lora_grpo.trainer.models import adapted_leaves, build_policy_model, shared_base
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import ARCHITECTURES, VOCAB, load_model, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

SHAPES = [(arch, tie) for arch in ARCHITECTURES for tie in (False, True) if (arch, tie) != ("gemma2", False)]
IDS = torch.arange(60).view(3, 20) % VOCAB


def shared_engine(directory: Path, **arguments: Any) -> VLLMEngine:
    return VLLMEngine(directory, max_lora_rank=8, share_base_weights=True, **{**ENGINE_ARGS, **arguments})


@pytest.fixture(scope="module")
def engine(llama_dir: Path) -> Iterator[VLLMEngine]:
    engine = shared_engine(llama_dir)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def written(llama_dir: Path) -> Iterator[VLLMEngine]:
    """One whose weights may be written to."""
    engine = shared_engine(llama_dir)
    yield engine
    engine.close()


def gradients(base: Any) -> dict[str, torch.Tensor]:
    """Gradients of an adapter's A and B for a fixed loss."""
    model = tiny_lora(base, r=8, scale=0.3).train()
    logits_BTV = model(IDS).logits.float()
    nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("arch", "tie"), SHAPES)
def test_same_memory_same_logits_same_gradients(arch: str, tie: bool, tmp_path: Path) -> None:
    """The vocabulary is no multiple of 64, so that vLLM pads it."""
    directory = tiny_model(arch, tmp_path, tie=tie, vocab=VOCAB + 3)
    engine = shared_engine(directory)
    try:
        model = engine.shared_model()
        assert_views(model, engine)
        assert_views(engine.shared_model(), engine)
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embedding) == tie
        own = load_model(directory, "bfloat16")
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, own(IDS).logits)
        shared, separate = gradients(model), gradients(own)
        assert shared.keys() == separate.keys()
        assert len(shared) == 2 * 7 * 2
        assert all(torch.equal(shared[name], separate[name]) for name in shared)
    finally:
        engine.close()


def assert_views(model: Any, engine: VLLMEngine) -> None:
    """Every parameter lies within the storage of one of the engine's."""
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for _, parameter in compat.base_parameters(engine._llm)
    }
    for name, parameter in model.named_parameters():
        start = parameter.untyped_storage().data_ptr()
        assert start in storages, name
        assert start <= parameter.data_ptr() < start + storages[start], name
    layer = model.model.layers[1].self_attn
    fused = dict(compat.base_parameters(engine._llm))["model.layers.1.self_attn.qkv_proj.weight"]
    rows = layer.q_proj.weight.shape[0] + layer.k_proj.weight.shape[0]
    assert layer.q_proj.weight.data_ptr() == fused.data_ptr()
    assert layer.v_proj.weight.data_ptr() == fused[rows:].data_ptr()


def test_a_trainer_on_the_engines_weights_pushes_and_is_proven(
    engine: VLLMEngine, llama_dir: Path, shm_dir: Path
) -> None:
    model = tiny_lora(engine.shared_model(), r=8)
    before = {name: p.detach().clone() for name, p in engine.shared_model().named_parameters()}
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, engine, store)
        assert sync.probe is not None
        assert sync.base_match is not None
        assert (sync.base_match.share, sync.base_match.unread) == (1.0, {})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sync.push(step)
        sync.close()
    base = peft_base(model)
    assert base.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in base.items())


def test_a_copy_that_differs_from_the_shared_weights_is_refused(engine: VLLMEngine, shm_dir: Path) -> None:
    copied = copy.deepcopy(engine.shared_model())
    with torch.no_grad():
        copied.model.layers[1].mlp.gate_proj.weight[2, 3] *= 1.01
    with (
        AdapterStore(shm_dir / "store") as store,
        pytest.raises(UnsupportedAdapter, match=r"1\.mlp\.gate_proj\.weight"),
    ):
        NativeSync(tiny_lora(copied, r=8), engine, store)


def peft_base(model: Any) -> dict[str, torch.Tensor]:
    inner = model.base_model.model
    return {name.replace(".base_layer.", "."): p for name, p in inner.named_parameters() if "lora_" not in name}


WRITES: dict[str, Callable[[FrozenParameter], object]] = {
    "add_": lambda p: p.add_(1),
    "copy_": lambda p: p.copy_(torch.zeros_like(p)),
    "zero_": lambda p: p.zero_(),
    "+=": lambda p: p.__iadd__(1),
    "*=": lambda p: p.__imul__(2),
    "[...] =": lambda p: p.__setitem__(0, 1.0),
    ".data +=": lambda p: p.data.add_(1),
    ".data =": lambda p: setattr(p, "data", torch.zeros(1)),
    "training it": lambda p: p.requires_grad_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_a_shared_parameter_raises(engine: VLLMEngine, write: Callable[[FrozenParameter], object]) -> None:
    parameter = engine.shared_model().model.layers[0].mlp.down_proj.weight
    before = parameter.detach().clone()
    with pytest.raises(ConfigError, match="an engine computes with the same memory"):
        write(parameter)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_raises_and_leaves_the_engine_as_it_was(engine: VLLMEngine, safe: bool) -> None:
    model = tiny_lora(engine.shared_model(), r=8)
    before = engine.logprobs([[5, 6, 7, 8]], adapter=None)
    with pytest.raises(ConfigError, match="nothing may merge into it"):
        model.merge_adapter(safe_merge=safe)
    with pytest.raises(ConfigError, match="nothing may merge into it"):
        model.merge_and_unload()
    assert engine.logprobs([[5, 6, 7, 8]], adapter=None) == before


def test_casting_and_moving_raise_unless_nothing_moves(engine: VLLMEngine) -> None:
    model = engine.shared_model()
    assert model.to("cpu", torch.bfloat16) is model
    with pytest.raises(ConfigError, match="moved or cast"):
        model.float()
    assert model.dtype == torch.bfloat16


def test_a_deep_copy_is_an_ordinary_model(engine: VLLMEngine) -> None:
    layer = copy.deepcopy(engine.shared_model().model.layers[0].mlp.down_proj)
    assert type(layer.weight) is nn.Parameter
    layer.weight.data.zero_()
    assert engine.shared_model().model.layers[0].mlp.down_proj.weight.any()


AROUND: dict[str, Callable[[Any], object]] = {
    "detach": lambda p: p.detach().add_(0.01),
    "a view": lambda p: p.view(-1).add_(0.01),
    "a row": lambda p: p[0].zero_(),
    "out=": lambda p: torch.add(p, 0.01, out=p),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
}


@pytest.mark.parametrize("write", AROUND.values(), ids=AROUND)
def test_a_write_that_went_around_the_guard_is_found(
    written: VLLMEngine, write: Callable[[FrozenParameter], object]
) -> None:
    shared = SharedBase(written._llm)
    shared.check_untouched()
    parameter = shared.model.model.layers[0].mlp.down_proj.weight
    write(parameter)
    with pytest.raises(DeliveryError, match=r"model\.layers\.0\.mlp\.down_proj\.weight.*was changed"):
        shared.check_untouched()


def test_such_a_write_stops_the_next_push(llama_dir: Path, shm_dir: Path) -> None:
    engine = shared_engine(llama_dir)
    try:
        model = tiny_lora(engine.shared_model(), r=8)
        with AdapterStore(shm_dir / "store") as store:
            sync = NativeSync(model, engine, store)
            sync.push(0)
            peft_base(model)["model.layers.1.mlp.down_proj.weight"].detach().add_(0.01)
            with pytest.raises(DeliveryError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*was changed"):
                sync.push(1)
            assert store.head is not None
            assert store.head.number == 1
    finally:
        engine.close()


def test_weights_that_the_engine_replaced_stop_the_next_load(llama_dir: Path) -> None:
    engine = shared_engine(llama_dir)
    try:
        shared = SharedBase(engine._llm)
        shared.check_untouched()
        layer = compat.wrapped_modules(engine._llm)["model.layers.0.self_attn.o_proj"].base_layer
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        with pytest.raises(DeliveryError, match=r"replaced model\.layers\.0\.self_attn\.o_proj\.weight"):
            shared.check_untouched()
    finally:
        engine.close()


UPDATES: dict[str, Callable[[Any], object]] = {
    "the model": lambda llm: compat.runner(llm).get_model().load_weights([("model.norm.weight", torch.zeros(64))]),
    "the runner": lambda llm: compat.runner(llm).reload_weights(),
    "the worker": lambda llm: llm.collective_rpc("reload_weights"),
    "a transfer": lambda llm: llm.collective_rpc("update_weights", args=({},)),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_vllms_own_weight_updates_are_refused(engine: VLLMEngine, update: Callable[[Any], object]) -> None:
    """They write through `.data`, which no version counter sees, to what the trainer computes with."""
    model = engine.shared_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match="that a trainer shares"):
        update(engine._llm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_engine_that_can_sleep_is_refused_before_it_starts() -> None:
    check_shareable({"max_model_len": 128, "enable_sleep_mode": False})
    with pytest.raises(ConfigError, match=r"enable_sleep_mode=True with share_base_weights: .*; leave it out, or give"):
        check_shareable({"enable_sleep_mode": True})


def test_an_untested_release_is_refused_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_release", lambda: (0, 31))
    with pytest.raises(ConfigError, match=r"not tested with vLLM 0\.31"):
        check_shareable({})
    monkeypatch.setattr(compat, "is_cpu", lambda: False)
    check_shareable({})


def test_a_prepacked_engine_is_refused(llama_engine: VLLMEngine) -> None:
    if compat.is_cpu() and not torch.cpu._is_avx512_supported():
        pytest.skip("this processor has no AVX-512 (avx512f): vLLM's library for it packs no weights")
    with pytest.raises(UnsupportedAdapter, match="it has prepacked its weights"):
        llama_engine.shared_model()


UNSHAREABLE: dict[str, tuple[Callable[[pytest.MonkeyPatch, VLLMEngine], object], str]] = {
    "quantized": (lambda patch, engine: patch.setattr(config(engine), "quant_config", object()), "are quantized"),
    "can sleep": (
        lambda patch, engine: patch.setattr(config(engine).model_config, "enable_sleep_mode", True),
        "it can sleep",
    ),
    "transformers in vLLM": (
        lambda patch, _: patch.setattr(
            compat, "runner", lambda _: SimpleNamespace(get_model=type("TransformersForCausalLM", (nn.Module,), {}))
        ),
        "vLLM's wrapper of a transformers model",
    ),
    "inference tensors": (
        lambda patch, engine: patch.setattr(compat, "base_parameters", lambda _: [("norm", inference_tensor())]),
        "inference tensors",
    ),
}


def config(engine: VLLMEngine) -> Any:
    return engine._llm.llm_engine.vllm_config


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(2)


@pytest.mark.parametrize(("change", "message"), UNSHAREABLE.values(), ids=UNSHAREABLE)
def test_an_engine_whose_weights_cannot_be_shared_is_refused(
    change: Callable[[pytest.MonkeyPatch, VLLMEngine], object],
    message: str,
    engine: VLLMEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SharedBase(engine._llm)
    change(monkeypatch, engine)
    with pytest.raises(UnsupportedAdapter, match=message):
        SharedBase(engine._llm)


def odd_architecture() -> Any:
    """A transformers model whose second linear layer vLLM would not have."""
    model = nn.Module()
    model.embed, model.head, model.extra = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False)
    model.get_input_embeddings, model.get_output_embeddings = lambda: model.embed, lambda: model.head
    model.tie_weights = lambda: None
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(tie_word_embeddings=False))
    return model


def served_as(tensors: dict[str, torch.Tensor]) -> NameMap:
    """A model of vLLM with those tensors; `embed` and `head` hold vocabularies."""
    model = nn.Module()
    for name, tensor in tensors.items():
        layer = nn.Module()
        layer.weight = nn.Parameter(tensor)
        if name in ("embed.weight", "head.weight"):
            layer.org_vocab_size = 8  # type: ignore[assignment]
        model.add_module(name.removesuffix(".weight"), layer)
    return NameMap(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": None}, r"vLLM has no weights for extra\.weight"),
        ({"extra.weight": torch.zeros(4, 5)}, r"extra\.weight is \(4, 4\), extra\.weight in vLLM \(4, 5\)"),
        ({"head.weight": torch.zeros(7, 4)}, r"head\.weight is \(8, 4\)"),
        ({"gate.weight": torch.zeros(4, 4)}, r"gate\.weight is in vLLM's"),
    ],
)
def test_what_does_not_match_is_refused_by_name(change: dict[str, torch.Tensor | None], message: str) -> None:
    served = {"embed.weight": torch.zeros(64, 4), "head.weight": torch.zeros(64, 4), "extra.weight": torch.zeros(4, 4)}
    own_weights._fill(odd_architecture(), served, served_as(served))
    changed = {name: tensor for name, tensor in {**served, **change}.items() if tensor is not None}
    with pytest.raises(UnsupportedAdapter, match=message):
        own_weights._fill(odd_architecture(), changed, served_as(changed))


def test_another_function_on_the_same_weights_is_refused(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes can agree where the architectures do not: here the rotary base differs."""
    engine = shared_engine(llama_dir)
    build = own_weights._skeleton

    def other_rotary(*args: Any) -> Any:
        model = build(*args)
        model.model.rotary_emb.inv_freq.mul_(7.3)
        return model

    try:
        monkeypatch.setattr(own_weights, "_skeleton", other_rotary)
        with pytest.raises(UnsupportedAdapter, match="nats per token"):
            engine.shared_model()
        # Nothing was shared: the engine's weights are its own affair.
        weight = dict(compat.base_parameters(engine._llm))["model.norm.weight"]
        compat.runner(engine._llm).get_model().load_weights([("model.norm.weight", torch.full_like(weight, 3.0))])
        assert (weight == 3.0).all()
        monkeypatch.undo()
        engine.shared_model()
    finally:
        engine.close()


def test_the_trainers_choice(engine: VLLMEngine, llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    name = ModelConfig(name=str(llama_dir))
    assert shared_base(False, name, engine, told.append) is None
    assert shared_base("auto", name, engine, told.append) is None
    assert shared_base(True, name, engine, told.append).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"base is bfloat16, the trainer's would be float32"):
        shared_base(True, name.replace(dtype="float32"), engine, told.append)
    with pytest.raises(ConfigError, match="not a PeftModel"):
        shared_base(True, nn.Linear(1, 1), engine, told.append)
    with pytest.raises(ConfigError, match="needs a VLLMEngine, not a FakeEngine"):
        shared_base(True, name, FakeEngine(lambda *_: "x"), told.append)
    assert told == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert shared_base("auto", name, engine, told.append).dtype == torch.bfloat16
    assert shared_base("auto", name.replace(dtype="float32"), engine, told.append) is None
    assert shared_base("auto", name, FakeEngine(lambda *_: "x"), told.append) is None
    assert len(told) == 1
    assert told[0].startswith("the trainer has its own copy of the base: the engine's base is bfloat16")


def test_a_base_that_is_to_be_sharded_is_no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: Any = SimpleNamespace(spec=SimpleNamespace(keep=None))
    closing, reporter, crew = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    assert assembly.Assembly(closing, reporter, crew, made_of, "auto").sharing == "auto"
    monkeypatch.setattr(assembly, "launched", lambda: SimpleNamespace(is_fsdp2=True))
    assert assembly.Assembly(closing, reporter, crew, made_of, "auto").sharing is False
    with pytest.raises(ConfigError, match="share_base_weights with FSDP2 would shard"):
        assembly.Assembly(closing, reporter, crew, made_of, True)
    given: Any = object()
    with pytest.raises(ConfigError, match="share_base_weights with FSDP2 would shard"):
        assembly.Assembly(closing, reporter, crew, made_of, "auto", given)


def test_a_policy_on_the_shared_base_has_a_trainable_adapter_only(engine: VLLMEngine, llama_dir: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj", "model.layers.0.mlp.up_proj"], task_type="CAUSAL_LM")
    name = ModelConfig(name=str(llama_dir))
    policy = build_policy_model(name, config, 0, engine.shared_model())
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert adapted_leaves(name, config) == ["q_proj", "up_proj"] == adapted_leaves(policy, None)


TARGETS: dict[str, tuple[Any, list[str] | None]] = {
    "all": ("all-linear", None),
    "names": (["q_proj", "model.layers.0.mlp.up_proj"], ["q_proj", "up_proj"]),
    "a regular expression": (r".*layers\.1\.(self_attn\.[kv]_proj|mlp\.down_proj)", ["down_proj", "k_proj", "v_proj"]),
    "PEFT's choice": (None, ["q_proj", "v_proj"]),
}


@pytest.mark.parametrize(("targets", "leaves"), TARGETS.values(), ids=TARGETS)
def test_only_what_is_adapted_will_be_wrapped(targets: Any, leaves: list[str] | None, llama_dir: Path) -> None:
    config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    name = ModelConfig(name=str(llama_dir))
    assert adapted_leaves(name, config) == leaves
    assert config.target_modules == LoraConfig(target_modules=targets).target_modules
    built = build_policy_model(name, config, 0)
    adapted = {
        path.partition(".lora_A")[0].rsplit(".", 1)[-1] for path, _ in built.named_parameters() if "lora_A" in path
    }
    assert adapted == set(leaves or linear_leaves(llama_dir))


def test_a_target_that_fits_nothing_is_refused_before_the_engine_starts(llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_modules='no_such_layer'"):
        adapted_leaves(ModelConfig(name=str(llama_dir)), LoraConfig(target_modules="no_such_layer"))


MEASURE = """
import json, sys
import torch
from lora_grpo.engines.vllm_local import VLLMEngine
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model

def resident():
    # Not the proportional set, which grows when another process lets go of a library that both had mapped.
    rows = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup") if ":" in line)
    return 1024 * int(rows["Rss"].split()[0])

engine = VLLMEngine(sys.argv[1], max_lora_rank=8, share_base_weights=True, **ENGINE_ARGS)
own = load_model(sys.argv[1], "bfloat16")
weights = sum(p.numel() * p.element_size() for p in own.parameters())
tokens = torch.arange(24)[None]
own(tokens); engine.logprobs([list(range(24))] * 4, adapter=None)
with_copy = resident()
del own
without = resident()
model = engine.shared_model(); model(tokens)
with open(sys.argv[2], "w") as out:
    json.dump({"weights": weights, "copy": with_copy - without, "shared": resident() - without}, out)
"""


def test_memory_holds_one_copy(tmp_path: Path) -> None:
    """Resident memory of a process: an own copy takes the weights' size again, the shared model next to nothing."""
    directory = tiny_model("qwen2", tmp_path / "model", hidden=1536, tie=True)
    code = [sys.executable, "-c", MEASURE, str(directory), str(tmp_path / "out.json")]
    done = subprocess.run(code, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["weights"] > 60e6
    assert found["copy"] > 0.8 * found["weights"]
    assert found["shared"] < 0.1 * found["weights"], found


def test_engine_settings_need_no_word_about_sharing() -> None:
    """Sharing is an argument of the trainer and of `VLLMEngine`; a run's file stays as it is."""
    assert "share_base_weights" not in EngineConfig.model_fields
