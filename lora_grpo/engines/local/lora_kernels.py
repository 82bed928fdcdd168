"""LoRA on vLLM's CPU backend as two matrix products a segment.

The stock path gathers a full copy of A and B for every token, which makes decoding 2-3x and prefill 5-6x slower than
the base, and before 0.33 it gives base rows of a mixed batch the last slot's adapter. Here the rows of each adapter
go through two plain products, and base rows through none; few rows (decoding) through both in one call of our own.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lora_grpo.engines import compat
from lora_grpo.kernels import rows as few_rows

TESTED = ((0, 32),)
"""The releases whose CPU wrapper this was tested to replace."""

Rows: TypeAlias = slice | torch.Tensor
"""Rows of a batch: a slice when they are consecutive, an index tensor when not."""

Stacks: TypeAlias = tuple[torch.Tensor, ...]
"""One tensor a slice of a fused layer: A (slots, 1, rank, in), or B (slots, 1, out, rank)."""

_installed: list[type] = []


def install() -> bool:
    """Replace the CPU wrapper's linear LoRA for the whole process; returns whether it is in place.

    Does nothing on another platform or on a release that it was not tested with.
    """
    if _installed:
        return True
    if not compat.is_cpu() or compat.vllm_release() not in TESTED:
        return False
    wrapper = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu").PunicaWrapperCPU
    fused = importlib.import_module("vllm.lora.layers.column_parallel_linear").MergedColumnParallelLinearWithLoRA
    stock_update, stock_create = wrapper.update_metadata, fused.create_lora_weights

    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_create(self, *args, **kwargs)
        self.lora_a_stacked = adjoin(self.lora_a_stacked)

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_update(self, *args, **kwargs)
        self.lora_segments = segments_of(self.token_lora_indices)

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stacks,
        lora_b_stacked: Stacks,
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        layers = self.__dict__.setdefault("lora_layers", {})
        layer = layers.get(id(lora_a_stacked))
        if layer is None:
            # The layer holds the tuple, so its id is not given to another one while the wrapper lives.
            layer = layers[id(lora_a_stacked)] = LayerSlots(lora_a_stacked, lora_b_stacked, output_slices)
        layer.add(y, x, scale, self.lora_segments)

    fused.create_lora_weights = create_lora_weights
    wrapper.update_metadata = update_metadata
    wrapper.add_lora_linear = add_lora_linear
    wrapper.lora_segments = []
    _installed.append(wrapper)
    return True


def adjoin(stacks: Stacks) -> Stacks:
    """The stacked A's of a fused layer again, now one above the other in one buffer (slots, 1, slices * rank, in).

    They are written to as before; a slot's, read as one matrix, take one product instead of one a slice.
    """
    ranks = [stack.shape[2] for stack in stacks]
    return torch.cat(stacks, dim=2).split(ranks, dim=2)


def segments_of(slot_N: torch.Tensor) -> list[tuple[int, Rows]]:
    """(slot, rows) for each adapter in a batch of N tokens; -1 (the base) has none."""
    segments: list[tuple[int, Rows]] = []
    for slot in slot_N.unique().tolist():
        if slot < 0:
            continue
        rows = (slot_N == slot).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        segments.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return segments


@dataclass(frozen=True)
class _Slot:
    """One slot's matrices: for each slice its A (rank, in), B transposed (rank, out), its columns of the product with A
    and its columns of the output; A of all slices (n * rank, in), or None where they are not adjoined; and what
    computes few rows of them, or None where nothing else than torch does."""

    slices: tuple[tuple[torch.Tensor, torch.Tensor, slice, slice], ...]
    a_RI: torch.Tensor | None
    rows: few_rows.SlotRows | None


class LayerSlots:
    """One wrapped layer's slots, cut up once: the buffers stay where they are for the engine's life."""

    def __init__(self, a_stacked: Stacks, b_stacked: Stacks, output_slices: tuple[int, ...]) -> None:
        """`output_slices[i]` is the width of the output columns that belong to stack i."""
        self.stacks = a_stacked
        slots = range(a_stacked[0].shape[0])
        self._slots = [_cut(slot, a_stacked, b_stacked, output_slices) for slot in slots]

    def add(self, y: torch.Tensor, x: torch.Tensor, scale: float, segments: list[tuple[int, Rows]]) -> None:
        """y += scale * (x A^T) B^T in place, each row with its own slot's A and B; y is (N, out), x is (N, in)."""
        y_NO = y if y.ndim == 2 else y.view(-1, y.shape[-1])
        x_NI = x if x.ndim == 2 else x.view(-1, x.shape[-1])
        for slot, rows in segments:
            if isinstance(rows, torch.Tensor):
                y_nO = y_NO[rows]
                _add(y_nO, x_NI[rows], scale, self._slots[slot])
                y_NO[rows] = y_nO
            elif rows.start == 0 and rows.stop == y_NO.shape[0]:
                _add(y_NO, x_NI, scale, self._slots[slot])
            else:
                _add(y_NO[rows], x_NI[rows], scale, self._slots[slot])


def _add(y_nO: torch.Tensor, x_nI: torch.Tensor, scale: float, slot: _Slot) -> None:
    """One adapter's rows. B's product is summed onto y before it is rounded."""
    if slot.rows is not None and few_rows.can_add(y_nO, x_nI):
        slot.rows.add(y_nO, x_nI, scale)
        return
    h = None if slot.a_RI is None else F.linear(x_nI, slot.a_RI)
    for a_RI, b_RO, inner, outer in slot.slices:
        h_nR = F.linear(x_nI, a_RI) if h is None else h[:, inner]
        y_nO[:, outer].addmm_(h_nR, b_RO, alpha=scale)


def _cut(slot: int, a_stacked: Stacks, b_stacked: Stacks, output_slices: tuple[int, ...]) -> _Slot:
    a, b = [stack[slot, 0] for stack in a_stacked], [stack[slot, 0] for stack in b_stacked]
    pieces, inner, outer = [], 0, 0
    for a_RI, b_OR, width in zip(a, b, output_slices, strict=True):
        rank = a_RI.shape[0]
        pieces.append((a_RI, b_OR.t(), slice(inner, inner + rank), slice(outer, outer + width)))
        inner, outer = inner + rank, outer + width
    adjoined = all(_follows(before, after) for before, after in itertools.pairwise(a))
    whole = a[0].as_strided((inner, a[0].shape[1]), a[0].stride()) if adjoined else None
    function = few_rows.compiled() if few_rows.takes(a, b) else None
    return _Slot(tuple(pieces), whole, function and few_rows.SlotRows(function, a, b))


def _follows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two matrices lie in one buffer, the second right behind the first."""
    return (
        before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.is_contiguous()
        and after.is_contiguous()
        and before.storage_offset() + before.numel() == after.storage_offset()
    )
