"""LoRA on vLLM's CPU backend as two matrix products a segment.

The stock path gathers A and B for every token, which makes decoding 2-3x and prefill 5-6x slower than the base. Here
the rows of each adapter go through two plain products, and base rows through none; few rows (decoding) through both in
one call of our own."""

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_grpo.engines import compat
from lora_grpo.engines.compat.patching import replaced, wrap_once
from lora_grpo.kernels import SlotRows

Rows: TypeAlias = slice | Tensor
"""Rows of a batch: a slice when they are consecutive, an index tensor when not."""

Stacks: TypeAlias = tuple[Tensor, ...]
"""One tensor a slice of a fused layer: A (slots, 1, rank, in), or B (slots, 1, out, rank)."""

_layers: "WeakValueDictionary[int, LayerKernels]" = WeakValueDictionary()
"""Layers by the address of their first stacked A, which is theirs as long as they live."""

_library = torch.library.Library("lora_grpo", "FRAGMENT")
_library.define("add_cpu_lora(Tensor(a!) y, Tensor x, Tensor a_stacked, float scale) -> ()")


def _add_cpu_lora(y: Tensor, x: Tensor, a_stacked: Tensor, scale: float) -> None:
    """`LayerKernels.add` of the layer whose first stacked A this is: one operator, which a compiler does not look into.
    Compiled code is given the tensor anew at each call, so it holds for another engine, and in another process."""
    _layers[a_stacked.data_ptr()].add(y, x, scale)


_library.impl("add_cpu_lora", _add_cpu_lora, "CPU")
torch.library.register_fake("lora_grpo::add_cpu_lora", lambda *_: None, lib=_library)


def applies() -> bool:
    return compat.is_cpu() and compat.vllm_release() in compat.TESTED_CPU


@contextmanager
def products_by_segment() -> Iterator[None]:
    """Engines that start within compute the LoRA of linear layers so; others, before and after, do not."""
    linear = importlib.import_module("vllm.lora.layers.base_linear").BaseLinearLayerWithLoRA
    fused = importlib.import_module("vllm.lora.layers.column_parallel_linear").MergedColumnParallelLinearWithLoRA
    stock_create = fused.create_lora_weights

    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_create(self, *args, **kwargs)
        self.lora_a_stacked = adjoin(self.lora_a_stacked)

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        vars(punica_wrapper).setdefault("lora_segments", [])
        wrap_once(punica_wrapper, "update_metadata", _update_metadata)
        self.punica_wrapper = LayerKernels(self, punica_wrapper)

    with replaced(fused, create_lora_weights=create_lora_weights), replaced(linear, set_mapping=set_mapping):
        yield


def _update_metadata(stock: Any, *args: Any, **kwargs: Any) -> None:
    stock(*args, **kwargs)
    stock.__self__.lora_segments = segments_of(stock.__self__.token_lora_indices)


class LayerKernels:
    """What one linear layer calls in place of vLLM's wrapper; only what such a layer calls is here."""

    def __init__(self, layer: Any, wrapper: Any) -> None:
        """`wrapper` knows which rows are whose. The layer's slots are cut up once: they stay for the engine's life."""
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        self._slots = [_Slot([one[slot, 0] for one in a], [one[slot, 0] for one in b]) for slot in range(len(a[0]))]
        self._wrapper = wrapper
        _layers[a[0].data_ptr()] = self

    def add_lora_linear(self, y: Tensor, x: Tensor, a: Stacks, b: Stacks, scale: float, *_: Any, **__: Any) -> None:
        """The stacked slots are those that the layer was given with."""
        if torch.compiler.is_compiling():
            torch.ops.lora_grpo.add_cpu_lora(y, x, a[0], scale)
        else:
            self.add(y, x, scale)

    def add(self, y: Tensor, x: Tensor, scale: float) -> None:
        """y += scale * (x A^T) B^T in place, each row with its own slot's A and B; y is (N, out), x is (N, in)."""
        y_NO = y if y.ndim == 2 else y.view(-1, y.shape[-1])
        x_NI = x if x.ndim == 2 else x.view(-1, x.shape[-1])
        for slot, rows in self._wrapper.lora_segments:
            # A slice costs microseconds at each layer of each token, also where one adapter has all rows.
            whole = isinstance(rows, slice) and rows.start == 0 and rows.stop == y_NO.shape[0]
            y_nO, x_nI = (y_NO, x_NI) if whole else (y_NO[rows], x_NI[rows])
            self._slots[slot].add(y_nO, x_nI, scale)
            if isinstance(rows, Tensor):
                y_NO[rows] = y_nO


class _Slot:
    """One adapter's matrices in one layer: A (rank, in) and B (out, rank) of each slice."""

    def __init__(self, a: list[Tensor], b: list[Tensor]) -> None:
        self.rows = SlotRows.of(a, b)
        # Each A, B transposed, its columns of the product with A and its columns of the output.
        self._slices: list[tuple[Tensor, Tensor, slice, slice]] = []
        inner, outer = 0, 0
        for a_RI, b_OR in zip(a, b, strict=True):
            rank, width = a_RI.shape[0], b_OR.shape[0]
            self._slices.append((a_RI, b_OR.t(), slice(inner, inner + rank), slice(outer, outer + width)))
            inner, outer = inner + rank, outer + width
        adjoined = all(_follows(before, after) for before, after in itertools.pairwise(a))
        # A of all slices (n * rank, in).
        self.a_RI = a[0].as_strided((inner, a[0].shape[1]), a[0].stride()) if adjoined else None

    def add(self, y_nO: Tensor, x_nI: Tensor, scale: float) -> None:
        """B's product is summed onto y before it is rounded."""
        if self.rows is not None and self.rows.takes(y_nO, x_nI):
            self.rows.add(y_nO, x_nI, scale)
            return
        h = None if self.a_RI is None else F.linear(x_nI, self.a_RI)
        for a_RI, b_RO, inner, outer in self._slices:
            h_nR = F.linear(x_nI, a_RI) if h is None else h[:, inner]
            y_nO[:, outer].addmm_(h_nR, b_RO, alpha=scale)


def adjoin(stacks: Stacks) -> Stacks:
    """A fused layer's A's, one above the other in a buffer (slots, 1, slices * rank, in): a slot's take one product."""
    ranks = [stack.shape[2] for stack in stacks]
    return torch.cat(stacks, dim=2).split(ranks, dim=2)


def segments_of(slot_N: Tensor) -> list[tuple[int, Rows]]:
    """(slot, rows) for each adapter in a batch of N tokens; -1 (the base) has none."""
    segments: list[tuple[int, Rows]] = []
    for slot in slot_N[slot_N >= 0].unique().tolist():
        rows = (slot_N == slot).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        segments.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return segments


def _follows(before: Tensor, after: Tensor) -> bool:
    one_buffer = before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    dense = before.is_contiguous() and after.is_contiguous()
    return one_buffer and dense and before.storage_offset() + before.numel() == after.storage_offset()
