"""LoRA on vLLM's CPU backend as two matrix products a segment.

The stock path gathers a full copy of A and B for every token, which makes decoding 2-3x and prefill 5-6x slower than
the base, and before 0.33 it gives base rows of a mixed batch the last slot's adapter. Here the rows of each adapter
go through two plain products, and base rows through none.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lora_grpo.engines import compat

TESTED = ((0, 32),)
"""The releases whose CPU wrapper this was tested to replace."""

Rows: TypeAlias = slice | torch.Tensor
"""Rows of a batch: a slice when they are consecutive, an index tensor when not."""

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
    stock_update = wrapper.update_metadata

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_update(self, *args, **kwargs)
        self.lora_segments = segments_of(self.token_lora_indices)

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        apply_segments(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, self.lora_segments)

    wrapper.update_metadata = update_metadata
    wrapper.add_lora_linear = add_lora_linear
    wrapper.lora_segments = []
    _installed.append(wrapper)
    return True


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


def apply_segments(
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: tuple[torch.Tensor, ...],
    b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    segments: list[tuple[int, Rows]],
) -> None:
    """y += scale * (x A^T) B^T in place, each row with its own slot's A and B.

    y is (N, out), x is (N, in); each stacked A is (slots, 1, rank, in), each stacked B (slots, 1, size, rank); slice i
    of y's columns, `output_slices[i]` wide, belongs to stack i.
    """
    y_NO, x_NI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for slot, rows in segments:
        x_rows = x_NI[rows]
        start = 0
        for a, b, width in zip(a_stacked, b_stacked, output_slices, strict=True):
            h_nR = F.linear(x_rows, a[slot, 0])
            if scale != 1.0:
                h_nR *= scale
            y_NO[rows, start : start + width] += F.linear(h_nR, b[slot, 0])
            start += width
