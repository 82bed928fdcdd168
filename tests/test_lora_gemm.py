"""LoRA as plain products over all slots: the arithmetic, what stays in place for graphs and compilers, real engines.

What it is compared with on engines are our CPU kernels, which have their own parity tests against vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.compat import slots as vllm_slots
from lora_grpo.engines.local import lora_gemm
from lora_grpo.engines.local.lora_gemm import LayerGemm, RowMask, lay_out
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, EngineError
from lora_grpo.scoring import mean_abs_difference
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, refill_lora, tiny_lora

SLOTS, RANK, IN, TOKENS = 3, 8, 24, 16
FUSIONS = {"single": (40,), "qkv": (32, 16, 16), "gate_up": (48, 48)}
BATCHES = {
    "one adapter": [1] * 6,
    "one adapter and base": [2, -1, 2, 2, -1],
    "several": [0, 0, -1, 2, 2, 1, 1, -1, 0],
    "base alone": [-1, -1, -1],
}
SAME_NATS = 0.05
"""Between two orders of summing bf16; a wrong adapter of these tests differs by 1 and more."""


class Layer:
    """A wrapped layer's slots as vLLM makes and fills them, and a batch's way through it."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.sizes = sizes
        layer = SimpleNamespace(
            lora_a_stacked=tuple(torch.zeros(SLOTS, 1, RANK, IN, dtype=dtype, device=device) for _ in sizes),
            lora_b_stacked=tuple(torch.zeros(SLOTS, 1, size, RANK, dtype=dtype, device=device) for size in sizes),
        )
        self.a_KI, self.b_OK = lay_out(layer)
        self.a, self.b = layer.lora_a_stacked, layer.lora_b_stacked
        self.rows = RowMask(TOKENS, SLOTS, RANK, self.a[0].device)
        self.gemm = LayerGemm(self.a_KI, self.b_OK, self.rows)
        for slot in range(SLOTS):
            self.fill(slot, seed=slot)

    def fill(self, slot: int, seed: int, rank: int = RANK) -> None:
        generator = torch.Generator().manual_seed(seed)
        for a, b in zip(self.a, self.b, strict=True):
            a[slot], b[slot] = 0, 0
            a[slot, 0, :rank].copy_(torch.randn(rank, IN, generator=generator) / IN**0.5)
            b[slot, 0, :, :rank].copy_(torch.randn(b.shape[2], rank, generator=generator) / rank**0.5)

    def batch(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """y and x of a batch, whose rows the mask then knows."""
        like = self.a[0]
        self.rows.update(torch.tensor(slots, device=like.device), any(slot >= 0 for slot in slots))
        generator = torch.Generator().manual_seed(9)
        y, x = (torch.randn(len(slots), size, generator=generator).to(like) for size in (sum(self.sizes), IN))
        return y, x

    def add(self, y: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        self.gemm.add_lora_linear(y, x, self.a, self.b, scale, self.sizes)

    def by_token(self, y: torch.Tensor, x: torch.Tensor, slots: list[int], scale: float = 1.0) -> torch.Tensor:
        """The definition: each row through the A and B of its own slot, one member at a time."""
        result = y.clone()
        for token, slot in enumerate(slots):
            if slot >= 0:
                made = [b[slot, 0] @ (a[slot, 0] @ x[token]) for a, b in zip(self.a, self.b, strict=True)]
                result[token] += scale * torch.cat(made)
        return result


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("sizes", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
def test_each_row_gets_its_own_adapter(slots: list[int], sizes: tuple[int, ...], scale: float) -> None:
    layer = Layer(sizes)
    y, x = layer.batch(slots)
    before, expected = y.clone(), layer.by_token(y, x, slots, scale)
    layer.add(y, x, scale)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    base = torch.tensor(slots) < 0
    assert torch.equal(y[base], before[base])
    assert base.all() or (y[~base] - before[~base]).abs().min(dim=0).values.max() > 0.01


def test_ranks_below_the_slots() -> None:
    layer, slots = Layer(FUSIONS["qkv"]), [0, 1, -1, 1]
    layer.fill(1, seed=7, rank=3)
    y, x = layer.batch(slots)
    expected = layer.by_token(y, x, slots)
    layer.add(y, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_products_read_what_a_slot_holds_now() -> None:
    """No copy of a slot is kept: an overwritten slot is the new adapter at the next product."""
    layer, slots = Layer(FUSIONS["gate_up"]), [1, 1, -1]
    y, x = layer.batch(slots)
    old = layer.by_token(y, x, slots)
    layer.fill(1, seed=42)
    expected = layer.by_token(y, x, slots)
    layer.add(y, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (old - expected).abs().max() > 0.1


def test_blocks_of_a_fused_layer_stay_apart() -> None:
    """Between the blocks there are zeros, however often slots are written: no member leaks into another's columns."""
    layer = Layer(FUSIONS["qkv"])
    for slot in range(SLOTS):
        layer.fill(slot, seed=slot + 10)
    columns = SLOTS * RANK
    for member, rows in enumerate(layer.b_OK.split(layer.sizes)):
        own = torch.zeros(layer.b_OK.shape[1], dtype=torch.bool)
        own[member * columns : (member + 1) * columns] = True
        assert rows[:, own].ne(0).all()
        assert rows[:, ~own].eq(0).all()


def test_rows_that_pad_a_graph_get_nothing() -> None:
    """A graph is replayed with more rows than the batch has; theirs were another batch's adapter rows before."""
    layer = Layer((40,))
    layer.batch([0] * 8)
    layer.batch([1, 1, 1])
    y, x = torch.ones(8, 40), torch.ones(8, IN)
    layer.add(y, x)
    assert y[:3].ne(1).any(dim=1).all()
    assert torch.equal(y[3:], torch.ones(5, 40))


def test_a_batch_without_adapters_is_left_alone() -> None:
    layer = Layer((40,))
    layer.batch([0] * 4)
    y, x = layer.batch([-1] * 4)
    x.fill_(float("nan"))
    before = y.clone()
    layer.add(y, x)
    assert torch.equal(y, before)


def test_an_overflow_stays_in_its_own_slot() -> None:
    """In float16 the product with another slot's A may overflow, and 0 times infinity is no number."""
    layer = Layer((40,), torch.float16)
    layer.a[0][1].fill_(3000.0)
    slots = [0, -1, 2, 0]
    y, x = layer.batch(slots)
    x.abs_().add_(20.0)
    assert torch.isinf(x @ layer.a[0][1, 0].t()).any()
    expected = layer.by_token(y.clone(), x, slots)
    layer.add(y, x)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=4e-2)


def test_buffers_stay_where_they_are() -> None:
    """A CUDA graph replays addresses."""
    layer = Layer(FUSIONS["qkv"])
    held = (layer.gemm.a_KI, layer.gemm.b_OK, layer.gemm.others_NC)
    addresses = [tensor.data_ptr() for tensor in held]
    for slots in BATCHES.values():
        layer.fill(0, seed=5)
        layer.add(*layer.batch(slots))
    assert [tensor.data_ptr() for tensor in (layer.gemm.a_KI, layer.gemm.b_OK, layer.rows.others_NC)] == addresses
    assert layer.a[0].data_ptr() == layer.a_KI.data_ptr()
    assert layer.b[0].data_ptr() == layer.b_OK.data_ptr()


def test_batched_outputs_are_written_in_place() -> None:
    layer, slots = Layer((40,)), [0, 1, -1, 2]
    y, x = layer.batch(slots)
    expected = layer.by_token(y, x, slots)
    y_221 = y.clone().view(2, 2, 40)
    layer.add(y_221, x.view(2, 2, IN))
    torch.testing.assert_close(y_221.view(4, 40), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_bakes_nothing_in(backend: str) -> None:
    """vLLM drops guards: one trace, made with no adapter in the batch, must serve every batch after it."""
    layer, weight = Layer(FUSIONS["gate_up"]), torch.randn(96, IN)
    compiler = CompileCounterWithBackend(backend)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        layer.add(y, x)
        return y.relu()

    compiled = torch.compile(forward, backend=compiler, fullgraph=True)
    for slots in ([-1] * 4, [0] * 5, [1, -1, 2], [2] * 7, [-1] * 2):
        _, x = layer.batch(slots)
        torch._dynamo.mark_dynamic(x, 0)
        expected = layer.by_token(x @ weight.t(), x, slots).relu()
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert compiler.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", FUSIONS.values(), ids=FUSIONS)
def test_a_cuda_graph_replays_every_kind_of_batch(sizes: tuple[int, ...]) -> None:
    layer = Layer(sizes, torch.bfloat16, "cuda")
    y, x = (tensor.clone() for tensor in layer.batch([0] * 8))
    start = y.clone()
    layer.add(y.clone(), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.add(y, x)
    for seed, slots in enumerate(([1] * 8, [2, -1] * 4, [0, 1, 2, -1], [-1] * 8)):
        layer.fill(1, seed=seed + 20)
        layer.batch(slots)
        y.copy_(start)
        graph.replay()
        expected = layer.by_token(start, x, slots)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=4e-2)


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", FUSIONS.values(), ids=FUSIONS)
def test_vllms_own_kernels_agree(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    layer, slots = Layer(sizes, dtype), [2, 2, 2, 0, 0, 1]
    y, x = layer.batch(slots)
    stock, before = y.clone(), y.clone()
    wrapper, ids = PunicaWrapperCPU(64, 64, "cpu"), tuple(slot + 1 for slot in slots)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1, 2, 3], SLOTS, 260)
    start = 0
    for a, b, size in zip(layer.a, layer.b, sizes, strict=True):
        hidden = torch.zeros(len(slots), RANK)
        wrapper.add_shrink((hidden,), x, (a,), 1.0)
        wrapper.add_expand(stock, (hidden,), (b,), (size,), offset_start=start, add_inputs=True)
        start += size
    layer.add(y, x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    torch.testing.assert_close(y, stock, **tolerance)
    assert (stock - before).abs().mean() > 0.3


# Engines


@pytest.fixture(scope="module")
def gemm_engine(llama_dir: Path) -> Iterator[VLLMEngine]:
    """Two slots, four loaded versions, prompts cut into chunks of 64 tokens."""
    engine = VLLMEngine(llama_dir, plain_lora_gemm=True, max_num_batched_tokens=64, **ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.fixture
def engines(gemm_engine: VLLMEngine, llama_engine: VLLMEngine) -> Iterator[tuple[VLLMEngine, VLLMEngine]]:
    """The one in question, and one to compare with; nothing loaded, before and after."""
    both = (gemm_engine, llama_engine)
    for engine in both:
        _empty(engine)
    yield both
    for engine in both:
        _empty(engine)


def _empty(engine: VLLMEngine) -> None:
    for version in engine.loaded():
        engine.unload(version)


def publish(llama_dir: Path, folder: Path, count: int, **lora: Any) -> list[AdapterVersion]:
    """Versions of one adapter that all differ."""
    model = tiny_lora(load_model(llama_dir), **{"r": 8, **lora})
    form = ServingForm(model, "default", torch.bfloat16)
    with AdapterStore(folder) as store:
        versions = []
        for seed in range(count):
            refill_lora(model, scale=0.3, seed=seed)
            versions.append(store.publish(form.files(), step=0))
    return versions


def sequences(count: int, tokens: int = 100) -> list[list[int]]:
    return torch.randint(4, 260, (count, tokens), generator=torch.Generator().manual_seed(count)).tolist()


def agree(engines: tuple[VLLMEngine, VLLMEngine], version: AdapterVersion | None, *, count: int = 2) -> None:
    """Both engines give the same log-probs."""
    ours, other = (engine.logprobs(sequences(count), adapter=version) for engine in engines)
    assert mean_abs_difference(ours, other) < SAME_NATS


@pytest.mark.vllm
def test_only_the_engine_that_asked_has_it(engines: tuple[VLLMEngine, VLLMEngine]) -> None:
    ours, other = (vllm_slots.wrapped_modules(engine._llm).values() for engine in engines)
    assert {type(layer.punica_wrapper) for layer in ours} == {LayerGemm}
    assert LayerGemm not in {type(layer.punica_wrapper) for layer in other}
    assert {len(layer.lora_a_stacked) for layer in ours} == {1, 2, 3}


@pytest.mark.vllm
def test_engines_agree_on_adapter_and_base(
    engines: tuple[VLLMEngine, VLLMEngine], llama_dir: Path, shm_dir: Path
) -> None:
    """In chunks, with an adapter of half the slots' rank in every layer."""
    (version,) = publish(llama_dir, shm_dir / "store", 1)
    for engine in engines:
        engine.load(version)
    agree(engines, version, count=5)
    agree(engines, None)
    base, adapted = (engines[0].logprobs(sequences(2), adapter=adapter) for adapter in (None, version))
    assert mean_abs_difference(base, adapted) > 0.1


@pytest.mark.vllm
def test_engines_agree_where_only_some_layers_are_adapted(
    engines: tuple[VLLMEngine, VLLMEngine], llama_dir: Path, shm_dir: Path
) -> None:
    """Members of fused layers without LoRA stay the base's, also in a slot that held another adapter before."""
    wide = publish(llama_dir, shm_dir / "wide", 2, r=16)
    (narrow,) = publish(llama_dir, shm_dir / "narrow", 1, r=4, targets=["k_proj", "up_proj", "down_proj"])
    for engine in engines:
        for version in (*wide, narrow):
            engine.load(version)
            engine.logprobs(sequences(1), adapter=version)
    for version in (narrow, *wide):
        agree(engines, version)


@pytest.mark.vllm
def test_engines_agree_on_mixed_batches(engines: tuple[VLLMEngine, VLLMEngine], llama_dir: Path, shm_dir: Path) -> None:
    first, second = publish(llama_dir, shm_dir / "store", 2)
    for engine in engines:
        engine.load(first)
        engine.load(second)
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    adapters = [first, None, second, second, None, first]
    groups = engines[0].generate(sequences(6, 40), sampling, adapter=adapters)
    for prompt, adapter, group in zip(sequences(6, 40), adapters, groups, strict=True):
        (made,) = group.completions
        (scored,) = engines[1].logprobs([[*prompt, *made.token_ids]], adapter=adapter)
        assert mean_abs_difference([list(made.logprobs)], [scored[-8:]]) < SAME_NATS


@pytest.mark.vllm
def test_versions_that_change_slots_are_never_stale(
    engines: tuple[VLLMEngine, VLLMEngine], llama_dir: Path, shm_dir: Path
) -> None:
    """Four versions take turns in two slots, some leave for good, and the same requests come again and again."""
    versions = publish(llama_dir, shm_dir / "store", 6)
    expected = {}
    for version in versions:
        engines[1].load(version)
        expected[version] = engines[1].logprobs(sequences(2), adapter=version)
    ours = engines[0]
    addresses = {layer.punica_wrapper.others_NC.data_ptr() for layer in vllm_slots.wrapped_modules(ours._llm).values()}
    for turn in ("0", "01", "012", "0123", "213", "30", "x1", "1", "4", "014", "x0x4", "5135", "0", "b", "5"):
        for name in turn.replace("x", ""):
            if "x" in turn and versions[int(name)] in ours.loaded():
                ours.unload(versions[int(name)])
            if name == "b":
                agree(engines, None)
                continue
            version = versions[int(name)]
            ours.load(version)
            got = ours.logprobs(sequences(2), adapter=version)
            gaps = [mean_abs_difference(got, other) for other in expected.values()]
            assert gaps[int(name)] < SAME_NATS < min(gap for v, gap in enumerate(gaps) if v != int(name)) / 5
    assert len(addresses) == 1
    assert addresses == {
        layer.punica_wrapper.others_NC.data_ptr() for layer in vllm_slots.wrapped_modules(ours._llm).values()
    }


@pytest.mark.vllm
def test_the_compile_cache_is_told(engines: tuple[VLLMEngine, VLLMEngine]) -> None:
    """vLLM would load a model that was compiled for other kernels by the hash of its config."""
    config = engines[0]._llm.llm_engine.vllm_config
    marked = config.compute_hash()
    marks, config.additional_config = config.additional_config, {}
    try:
        assert config.compute_hash() != marked
    finally:
        config.additional_config = marks
    assert lora_gemm.engine_arguments({"additional_config": {"mine": 1}})["additional_config"]["mine"] == 1


@pytest.mark.vllm
def test_a_sleep_that_discards_its_buffers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_release", lambda: (0, 32))
    with pytest.raises(ConfigError, match="enable_sleep_mode"):
        lora_gemm.engine_arguments({"enable_sleep_mode": True})
    monkeypatch.setattr(compat, "vllm_release", lambda: (0, 33))
    lora_gemm.engine_arguments({"enable_sleep_mode": True})


@pytest.mark.vllm
def test_an_engine_that_would_not_have_it_is_refused() -> None:
    with pytest.raises(EngineError, match="no linear layer"), lora_gemm.plain_products():
        pass
