"""The CPU LoRA kernels against a loop over tokens, and against vLLM's own where that is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_grpo.engines.local.lora_kernels import LayerKernels, Rows, adjoin, segments_of
from lora_grpo.kernels import FEW_ROWS

SLOTS, RANK, IN = 3, 8, 24
FEW = FEW_ROWS[torch.bfloat16]
FUSIONS = {"single": (40,), "qkv": (32, 16, 16), "gate_up": (48, 48)}
BATCHES = {
    "one adapter": [1] * 6,
    "blocks": [0, 0, 0, 2, 2, 1, 1, 1, 1],
    "base between blocks": [-1, -1, 2, 2, -1, 0, 0, -1],
    "interleaved": [0, -1, 2, 0, -1, 2, 1, 0, -1],
    "decode": [2, 0, 1, -1],
    "base alone": [-1, -1, -1],
}
STOCK_BATCHES = {
    "one adapter": [1] * 6,
    "blocks": [2, 2, 2, 0, 0, 1],
    "interleaved": [0, 2, 1, 1, 0, 2, 0],
    "more rows than the compiled call takes": [1] * FEW + [0, 1],
}
"""Before 0.33 vLLM gives the rows of the base the last slot's adapter: there is nothing to compare them with."""


def layer(a: Any, b: Any, sizes: tuple[int, ...], segments: Any = ()) -> LayerKernels:
    """As vLLM's layer of these slots has it, with a batch of these segments."""
    stacked = SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b, output_slices=sizes)
    return LayerKernels(stacked, SimpleNamespace(lora_segments=segments))


def apply_segments(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Any,
    b: Any,
    scale: float,
    sizes: tuple[int, ...],
    segments: list[tuple[int, Rows]],
) -> None:
    """Both ways: with the A's of a fused layer apart, and in one buffer as they are in an engine."""
    apart = y.clone()
    layer(a, b, sizes, segments).add(apart, x, scale)
    layer(adjoin(a), b, sizes, segments).add(y, x, scale)
    torch.testing.assert_close(y, apart)


def stacks(sizes: tuple[int, ...], dtype: torch.dtype, ranks: tuple[int, ...] = (RANK,) * SLOTS) -> tuple[Any, Any]:
    """Random (slots, 1, rank, in) and (slots, 1, size, rank) buffers, zero beyond each slot's own rank as in vLLM."""
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(SLOTS, 1, RANK, IN, generator=generator) / IN**0.5 for _ in sizes]
    b = [torch.randn(SLOTS, 1, size, RANK, generator=generator) / RANK**0.5 for size in sizes]
    for slot, rank in enumerate(ranks):
        for tensor_a, tensor_b in zip(a, b, strict=True):
            tensor_a[slot, :, rank:] = 0
            tensor_b[slot, :, :, rank:] = 0
    return tuple(t.to(dtype) for t in a), tuple(t.to(dtype) for t in b)


def batch(slots: list[int], width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.randn(len(slots), size, generator=generator).to(dtype) for size in (width, IN))
    return y, x


def by_token(
    y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, scale: float, sizes: tuple[int, ...], slots: list[int]
) -> torch.Tensor:
    result = y.clone()
    for token, slot in enumerate(slots):
        start = 0
        for a_slots, b_slots, size in zip(a, b, sizes, strict=True):
            if slot >= 0:
                result[token, start : start + size] += scale * (b_slots[slot, 0] @ (a_slots[slot, 0] @ x[token]))
            start += size
    return result


def test_segments_are_slices_where_rows_are_consecutive() -> None:
    segments = segments_of(torch.tensor([-1, 2, 2, 0, -1, 0, 1]))
    assert [slot for slot, _ in segments] == [0, 1, 2]
    rows = dict(segments)
    assert (rows[1], rows[2]) == (slice(6, 7), slice(1, 3))
    assert isinstance(rows[0], torch.Tensor)
    assert rows[0].tolist() == [3, 5]
    assert segments_of(torch.tensor([-1, -1])) == []
    assert segments_of(torch.tensor([], dtype=torch.long)) == []


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
def test_segments_hold_each_adapter_row_once(slots: list[int]) -> None:
    held = {
        slot: list(range(len(slots)))[rows] if isinstance(rows, slice) else rows.tolist()
        for slot, rows in segments_of(torch.tensor(slots))
    }
    assert held == {slot: [i for i, s in enumerate(slots) if s == slot] for slot in set(slots) - {-1}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("sizes", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
def test_each_row_gets_its_own_adapter(
    slots: list[int], sizes: tuple[int, ...], scale: float, dtype: torch.dtype
) -> None:
    a, b = stacks(sizes, dtype)
    y, x = batch(slots, sum(sizes), dtype)
    expected = by_token(y.float(), x.float(), *([t.float() for t in pair] for pair in (a, b)), scale, sizes, slots)
    before = y.clone()
    apply_segments(y, x, a, b, scale, sizes, segments_of(torch.tensor(slots)))
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.float(), expected, rtol=rounding, atol=1e-5)
    base = torch.tensor(slots) < 0
    assert torch.equal(y[base], before[base])
    assert base.all() or (y[~base] - before[~base]).abs().min(dim=0).values.max() > 0.01


def test_ranks_below_the_slots() -> None:
    """A slot's rows beyond its adapter's rank are zero: the product over the whole slot is that of the adapter."""
    sizes, slots, ranks = FUSIONS["qkv"], [0, 1, 2, -1, 1], (1, 4, 8)
    a, b = stacks(sizes, torch.float32, ranks)
    y, x = batch(slots, sum(sizes), torch.float32)
    expected = y.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            own = [tb[slot, 0, :, : ranks[slot]] @ (ta[slot, 0, : ranks[slot]] @ x[token]) for ta, tb in zip(a, b)]  # noqa: B905
            expected[token] += torch.cat(own)
    apply_segments(y, x, a, b, 1.0, sizes, segments_of(torch.tensor(slots)))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_matrices_that_only_seem_to_follow_each_other_are_read_apart() -> None:
    """The second one's offset is right, but in a buffer of its own: read as one matrix, the first would run on past its
    end."""
    (first, second), b = ([stack[:1].clone() for stack in stacks_] for stacks_ in stacks((16, 24), torch.float32))
    apart = torch.zeros(2 * second.numel())[second.numel() :].view_as(second).copy_(second)
    assert apart.storage_offset() == first.storage_offset() + first.numel()
    (slot,) = layer((first, apart), tuple(b), (16, 24))._slots
    assert slot.a_RI is None
    (slot,) = layer(adjoin((first, apart)), tuple(b), (16, 24))._slots
    assert slot.a_RI is not None


@pytest.mark.parametrize("sizes", FUSIONS.values(), ids=FUSIONS)
def test_few_rows_and_many_give_the_same(sizes: tuple[int, ...]) -> None:
    a, b = stacks(sizes, torch.bfloat16, (1, 4, 8))
    many, few_rows = (layer(adjoin(a), b, sizes, [(1, slice(0, count))]) for count in (FEW + 1, FEW))
    assert all(slot.rows is not None for slot in many._slots)
    y, x = batch([1] * (FEW + 1), sum(sizes), torch.bfloat16)
    few, before = y[:FEW].clone(), y.clone()
    many.add(y, x, 0.5)
    few_rows.add(few, x[:FEW], 0.5)
    # Many rows round the product with A to bfloat16, few do not.
    torch.testing.assert_close(few, y[:FEW], rtol=2e-2, atol=2e-2)
    assert (y - before).abs().mean() > 0.1


def test_batched_outputs_are_written_in_place() -> None:
    """vLLM may hand over (batch, tokens, width); the caller keeps the tensor that it passed."""
    a, b = stacks((40,), torch.float32)
    y, x = batch([0, 1, -1, 2], 40, torch.float32)
    expected = by_token(y, x, a, b, 1.0, (40,), [0, 1, -1, 2])
    y_221, x_221 = y.clone().view(2, 2, 40), x.view(2, 2, IN)
    apply_segments(y_221, x_221, a, b, 1.0, (40,), segments_of(torch.tensor([0, 1, -1, 2])))
    torch.testing.assert_close(y_221.view(4, 40), expected, rtol=1e-5, atol=1e-5)


def stock_wrapper(slots: list[int], *, prefill: bool) -> Any:
    """vLLM's own CPU wrapper, ready for a batch of these slots."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(256, 256, "cpu")
    ids = tuple(slot + 1 for slot in slots)
    mapping = LoRAMapping(index_mapping=ids, prompt_mapping=ids, is_prefill=prefill)
    wrapper.update_metadata(mapping, [1, 2, 3], SLOTS, 260)
    return wrapper


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("ranks", [(RANK,) * SLOTS, (1, 4, RANK)], ids=["full ranks", "ranks below the slots'"])
@pytest.mark.parametrize("sizes", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("slots", STOCK_BATCHES.values(), ids=STOCK_BATCHES)
def test_vllms_own_kernels_agree_on_batches_without_base_rows(
    slots: list[int], sizes: tuple[int, ...], ranks: tuple[int, ...], prefill: bool, dtype: torch.dtype
) -> None:
    a, b = stacks(sizes, dtype, ranks)
    y, x = batch(slots, sum(sizes), dtype)
    stock = y.clone()
    wrapper = stock_wrapper(slots, prefill=prefill)
    start = 0
    for stacked_a, stacked_b, size in zip(a, b, sizes, strict=True):
        hidden = torch.zeros(len(slots), RANK)
        wrapper.add_shrink((hidden,), x, (stacked_a,), 1.0)
        wrapper.add_expand(stock, (hidden,), (stacked_b,), (size,), offset_start=start, add_inputs=True)
        start += size
    apply_segments(y, x, a, b, 1.0, sizes, segments_of(wrapper.token_lora_indices))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    torch.testing.assert_close(y, stock, **tolerance)
    moved = (stock - batch(slots, sum(sizes), dtype)[0]).abs().mean(dim=1)
    assert moved.min() > 2 * (y - stock).abs().mean()
    assert moved.mean() > (0.3 if min(ranks) == RANK else 0.1)
