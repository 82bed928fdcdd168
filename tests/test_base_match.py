"""The trainer's base is the engine's in every tensor: what differs is refused by name, what was not read is listed."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.engines import packing
from lora_grpo.engines.base import BaseDescription
from lora_grpo.engines.delivery import agreement
from lora_grpo.engines.delivery.agreement import describe, match_base
from lora_grpo.engines.names import BaseReading, read_base
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import DeliveryError, UnsupportedAdapter
from lora_grpo.grpo.processes import Processes
from lora_grpo.sync import NativeSync
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

PROMPTS = ["2 + 2 = ", "The sea is ", "Once upon a time"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def store(shm_dir: Path) -> Iterator[AdapterStore]:
    with AdapterStore(shm_dir / "store") as opened:
        yield opened


@torch.no_grad()
def nudge(parameter: torch.Tensor, times: float = 1.01) -> None:
    """Change one value by a little more than what bfloat16 tells apart."""
    parameter.view(-1)[5] *= times


def test_every_tensor_is_compared_and_the_receipt_says_so(
    llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore
) -> None:
    model = load_model(llama_dir)
    tensors = len(model.state_dict())
    match = NativeSync(tiny_lora(model), llama_engine, store).base_match
    assert match is not None
    assert match.compared == match.tensors == tensors
    assert (match.share, match.unread) == (1.0, {})
    assert 0 < match.read_s < match.seconds


@pytest.mark.parametrize("leaf", LINEAR)
def test_one_value_of_a_linear_weight(
    llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore, leaf: str
) -> None:
    """Embeddings and norms agree, and no log-prob can tell."""
    base = load_model(llama_dir)
    name = next(name for name, _ in base.named_parameters() if "layers.1." in name and leaf in name)
    weight = base.get_parameter(name)
    nudge(weight)
    with pytest.raises(UnsupportedAdapter, match=rf"^{name} differs between the engine and the trainer"):
        NativeSync(tiny_lora(base), llama_engine, store)


def test_the_first_tensor_that_differs_is_named(llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore) -> None:
    base = load_model(llama_dir)
    for layer in base.model.layers:
        nudge(layer.mlp.up_proj.weight)
    with pytest.raises(UnsupportedAdapter, match=r"^model\.layers\.0\.mlp\.up_proj\.weight differs"):
        NativeSync(tiny_lora(base), llama_engine, store)


def test_a_float64_base_is_compared_too(llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore) -> None:
    model = tiny_lora(load_model(llama_dir).double())
    match = NativeSync(model, llama_engine, store).base_match
    assert match is not None
    assert (match.compared, match.unread) == (match.tensors, {})
    nudge(model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.base_layer").weight)
    with pytest.raises(UnsupportedAdapter, match=r"^model\.layers\.1\.mlp\.down_proj\.weight differs"):
        match_base(llama_engine, model, Processes(None))


@pytest.mark.parametrize("scale", [0.002, 0.0005])
def test_an_adapter_that_was_merged_into_the_trainers_base(
    llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore, scale: float
) -> None:
    """The change is below a hundredth of each weight's norm: the base's log-probs are as near as another dtype's."""
    merged = tiny_lora(load_model(llama_dir), r=8, scale=scale).merge_and_unload()
    before, after = load_model(llama_dir).model.layers[0], merged.model.layers[0]
    change = (after.mlp.up_proj.weight - before.mlp.up_proj.weight).norm() / before.mlp.up_proj.weight.norm()
    assert 0 < change < 0.02
    with pytest.raises(UnsupportedAdapter, match=r"q_proj\.weight differs .* nothing merged into it"):
        NativeSync(tiny_lora(merged, r=4), llama_engine, store)


def test_another_revision_with_the_same_embeddings_and_norms(
    llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore, tmp_path: Path
) -> None:
    first = load_model(llama_dir).state_dict()
    other = load_model(tiny_model("llama", tmp_path / "other", seed=1))
    kept = {name: value for name, value in first.items() if "norm" in name or "embed" in name or "lm_head" in name}
    other.load_state_dict({**other.state_dict(), **kept})
    with pytest.raises(UnsupportedAdapter, match=r"layers\.0\.self_attn\.q_proj\.weight differs"):
        NativeSync(tiny_lora(other), llama_engine, store)


def test_a_head_that_is_not_the_engines(llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore) -> None:
    base = load_model(llama_dir)
    nudge(base.lm_head.weight)
    with pytest.raises(UnsupportedAdapter, match=r"^lm_head\.weight differs"):
        NativeSync(tiny_lora(base), llama_engine, store)


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
def test_a_tied_head(arch: str, store: AdapterStore, tmp_path: Path) -> None:
    """It counts as compared where it is the embedding; one of its own is refused, though the engine has none (vLLM's
    Gemma 2 reads its output layer from the embedding)."""
    directory = tiny_model(arch, tmp_path, tie=True)
    engine = VLLMEngine(directory, max_lora_rank=8, **ENGINE_ARGS)
    try:
        tied, untied = load_model(directory), load_model(directory)
        match = NativeSync(tiny_lora(tied), engine, store).base_match
        assert match is not None
        assert (match.share, match.unread) == (1.0, {})
        untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
        nudge(untied.lm_head.weight)
        with pytest.raises(UnsupportedAdapter, match=r"^lm_head\.weight differs"):
            NativeSync(tiny_lora(untied), engine, store)
    finally:
        engine.close()


@pytest.mark.parametrize("rows", [torch.randn(37, 5), torch.randn(41), torch.randn(7, 3, 2)], ids=["2", "1", "3"])
def test_a_digest_is_of_the_values_in_the_dtype_that_is_asked_for(
    rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks it takes, and whether or not they pass through one place on the host."""
    half = rows.bfloat16()
    whole = xxhash.xxh3_128(half.float().numpy().tobytes()).hexdigest()
    for block_bytes in (1, 100, 1 << 20):
        monkeypatch.setattr(packing, "_BLOCK_BYTES", block_bytes)
        assert packing.digest(half, torch.float32) == packing.digest(half.float(), torch.float32) == whole
        assert packing.digest(half.t() if half.ndim == 2 else half, torch.bfloat16) != whole


class Stand:
    """An engine in front of a model whose layers can be packed as vLLM's CPU backend does on some processors."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def describe_base(self) -> BaseDescription:
        return describe(self.model.config, "bfloat16")

    def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        config = SimpleNamespace(hf_text_config=self.model.config)
        return [read_base(SimpleNamespace(get_model=lambda: self.model, model_config=config), shapes, "the engine")]


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Linear], None]:
    """vLLM's packing of a layer, which keeps no weight of its plain form and turns a bias into float32."""

    def stock(layer: Any, remove_weight: bool) -> None:
        if remove_weight:
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype))
        if layer.bias is not None:
            layer.bias.data = layer.bias.float()

    layers = importlib.import_module("vllm.model_executor.layers.utils")
    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", stock)
    packing.read_before_packing()
    packing.read_before_packing()
    return lambda layer: layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def test_a_weight_that_is_packed_is_read_before(llama_dir: Path, pack: Callable[[torch.nn.Linear], None]) -> None:
    served: Any = load_model(llama_dir, dtype="bfloat16")
    layer = served.model.layers[0].mlp.up_proj
    layer.bias = torch.nn.Parameter(torch.randn(128).bfloat16())
    trainer = copy.deepcopy(served).float()
    pack(layer)
    assert (layer.weight.numel(), layer.bias.dtype) == (0, torch.float32)
    trainer_model = tiny_lora(trainer)
    match = match_base(Stand(served), trainer_model, Processes(None))  # type: ignore[arg-type]
    assert (match.share, match.unread) == (1.0, {})
    own = trainer.model.layers[0].mlp.up_proj.base_layer
    for tensor in (own.weight, own.bias):
        nudge(tensor)
        with pytest.raises(UnsupportedAdapter, match=r"layers\.0\.mlp\.up_proj\.(weight|bias) differs"):
            match_base(Stand(served), trainer_model, Processes(None))  # type: ignore[arg-type]
        nudge(tensor, 1 / 1.01)


def test_what_could_not_be_read_is_listed_and_never_counted_as_equal(llama_dir: Path) -> None:
    """Packed before anything read it, quantized, or laid out otherwise."""
    served, trainer = load_model(llama_dir, dtype="bfloat16"), load_model(llama_dir)
    packed, quantized, turned = (
        getattr(served.model.layers[1].mlp, leaf) for leaf in ("down_proj", "up_proj", "gate_proj")
    )
    packed.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    quantized.weight = torch.nn.Parameter(quantized.weight.to(torch.float8_e4m3fn), requires_grad=False)
    turned.weight = torch.nn.Parameter(turned.weight.T.contiguous())
    values = sum(p.numel() for p in trainer.parameters())
    nudge(trainer.model.layers[1].mlp.down_proj.weight)
    match = match_base(Stand(served), tiny_lora(trainer), Processes(None))  # type: ignore[arg-type]
    name = "model.layers.1.mlp.{}.weight"
    assert match.unread == {
        "the engine": {
            name.format("gate_proj"): "vLLM holds it as [64, 128], the checkpoint as [128, 64]",
            name.format("up_proj"): "vLLM keeps it quantized (float8_e4m3fn)",
            name.format("down_proj"): "vLLM has packed it for its kernels, and nothing read it before",
        }
    }
    assert match.compared == match.tensors - 3
    assert match.share == pytest.approx(1 - 3 * 64 * 128 / values)
    assert f"not read in the engine: {name.format('gate_proj')} (vLLM holds it as" in str(match)


def test_a_tensor_that_is_gathered_is_not_told_as_quantized(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What FSDP2 sharded is whole, in another tensor than the trainer's."""
    served, trainer = load_model(llama_dir, dtype="bfloat16"), load_model(llama_dir)
    monkeypatch.setattr(agreement, "DTensor", torch.Tensor)
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda tensor: tensor.detach().clone(), raising=False)
    model = tiny_lora(trainer)
    assert match_base(Stand(served), model, Processes(None)).quantized == 0  # type: ignore[arg-type]
    nudge(trainer.model.norm.weight)
    with pytest.raises(UnsupportedAdapter, match=r"norm\.weight differs between the engine and the trainer"):
        match_base(Stand(served), model, Processes(None))  # type: ignore[arg-type]


def test_a_tensor_that_only_one_side_has_is_listed(
    llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore
) -> None:
    base: Any = load_model(llama_dir)
    base.model.norm.register_buffer("scale", torch.ones(3))
    match = NativeSync(tiny_lora(base), llama_engine, store).base_match
    assert match is not None
    assert match.unread == {"the engine": {"model.norm.scale": "vLLM's model has no tensor for it"}}
    assert match.share < 1


def test_a_wrong_base_cannot_widen_the_canarys_limit(
    llama_engine: VLLMEngine, llama_dir: Path, store: AdapterStore
) -> None:
    """A base that changes after the start: what the bases then differ by is no noise."""
    model = tiny_lora(load_model(llama_dir), scale=0.01)
    sync = NativeSync(model, llama_engine, store)
    groups = llama_engine.generate(PROMPTS, Sampling(n=4, max_tokens=16, seed=1), adapter=sync.push(step=0))
    assert sync.probe is not None
    assert sync.canary(groups).noise <= 2 * sync.probe.noise
    with torch.no_grad():
        for layer in model.base_model.model.model.layers:
            layer.mlp.down_proj.base_layer.weight.mul_(1.5)
    with pytest.raises(DeliveryError, match="canary failed"):
        sync.canary([replace(group) for group in groups])
