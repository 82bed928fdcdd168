"""LoRA as two plain matrix products a layer: `y += (x A^T, masked) B^T`, over all slots at once.

vLLM's LoRA kernels sort rows by adapter and look up each group's slot. A rollout batch mostly uses one adapter, which
needs none of that. Here the A's of a layer (of every slot, and of every member of a fused layer) lie one above the
other in one buffer, and the B's side by side in another; a mask leaves each row the columns of its own slot, and 0 in
those of others, whatever was there. Base rows and the rows that pad a CUDA graph have no column.

Why over all slots, and not over the one that a batch uses: a choice would have to be made for each batch. Compiled
code would bake it in, a CUDA graph would replay the one it was captured with, and vLLM's graphs are keyed by how many
adapters a batch has, not by which; a copy of the active adapter could be stale. Without a choice there is nothing to
get wrong: the products read the very slots that versions are loaded into and proven in, batches of several versions
are right in the same graph, and all addresses stay.

A fused layer's B has a block for each member and zeros elsewhere: at decoding a launch costs more than multiplying by
those zeros, and at prefill the product is bound by reading and writing y. So each layer launches three kernels (A,
mask, B), as vLLM does. The price of both is bytes: a Qwen2.5-7B at rank 16 reads 246 MB a step with max_loras=2, 1.6 %
of its weights, and 123 MB with max_loras=1, where the adapter alone has 81 MB.

B's product is summed onto y before it is rounded, and nothing is added up atomically, as vLLM's split sums are. Every
slot's B must be finite, as 0 * NaN is NaN for every row: loading refuses other files.

Off by default until parity and timing on a GPU are known. What it rests on in vLLM 0.26 to 0.33: every linear layer is
given its kernels by `set_mapping` and calls only `add_lora_linear`; `update_metadata` runs before each batch whose
rows or slots are others than the last one's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_grpo.engines import compat
from lora_grpo.engines.local.compiling import marked
from lora_grpo.engines.patching import replaced
from lora_grpo.errors import ConfigError, EngineError

# Axes: N tokens of a batch, I inputs, O outputs, C columns of the mask (slots * rank), K = members of the layer * C.

_library = torch.library.Library("lora_grpo", "FRAGMENT")
_library.define(
    "add_lora(Tensor(a!) y, Tensor x, Tensor a_KI, Tensor b_OK, Tensor others_NC, Tensor any_lora, float scale) -> ()"
)


def _add_lora(
    y: Tensor, x: Tensor, a_KI: Tensor, b_OK: Tensor, others_NC: Tensor, any_lora: Tensor, scale: float
) -> None:
    """y (..., O) gets each row's LoRA in place; nothing where `any_lora`, on the CPU, is False.

    One operator, which a compiler does not look into: `any_lora` is read when it runs, and y is added to where it is.
    """
    if not any_lora.item():
        return
    y_NO, x_NI = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    tokens, columns = x_NI.shape[0], others_NC.shape[1]
    h_NK = x_NI @ a_KI.t()
    h_NK.view(tokens, -1, columns).masked_fill_(others_NC[:tokens, None], 0)
    y_NO.addmm_(h_NK, b_OK.t(), alpha=scale)


_library.impl("add_lora", _add_lora, "CPU")
_library.impl("add_lora", _add_lora, "CUDA")
torch.library.register_fake("lora_grpo::add_lora", lambda *_: None, lib=_library)


class RowMask:
    """Which columns belong to other slots than a row's own, in the current batch; written in place, to be captured."""

    def __init__(self, tokens: int, slots: int, rank: int, device: torch.device) -> None:
        """For batches of up to `tokens`."""
        self.others_NC = torch.ones(tokens, slots * rank, dtype=torch.bool, device=device)
        self.any_lora = torch.zeros(1, dtype=torch.bool)
        self._slot_C = torch.arange(slots, device=device).repeat_interleave(rank)

    def update(self, slot_N: Tensor, any_lora: bool) -> None:
        """Rows of the next batch; -1 is the base, as are the rows after them."""
        tokens = slot_N.shape[0]
        self.others_NC[:tokens].copy_(slot_N[:, None] != self._slot_C)
        self.others_NC[tokens:].fill_(True)
        self.any_lora.fill_(any_lora)


class LayerGemm:
    """What one linear layer calls in place of vLLM's kernels; only what such a layer calls is here."""

    def __init__(self, a_KI: Tensor, b_OK: Tensor, rows: RowMask) -> None:
        self.a_KI, self.b_OK = a_KI, b_OK
        self.others_NC, self.any_lora = rows.others_NC, rows.any_lora

    def add_lora_linear(
        self, y: Tensor, x: Tensor, a_stacked: Any, b_stacked: Any, scale: float, *_: Any, **__: Any
    ) -> None:
        """y += scale * the LoRA of x, in place. The stacked slots are views of the buffers that it multiplies by."""
        torch.ops.lora_grpo.add_lora(y, x, self.a_KI, self.b_OK, self.others_NC, self.any_lora, scale)


def lay_out(layer: Any) -> tuple[Tensor, Tensor]:
    """Give a layer's stacked slots one buffer for A (K, I) and one for B (O, K), and return those.

    `lora_a_stacked` and `lora_b_stacked` stay tuples of (slots, 1, rank, I) and (slots, 1, out, rank), as views.
    """
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    slots, _, rank, inputs = a[0].shape
    widths = [stacked.shape[2] for stacked in b]
    a_flat = a[0].new_zeros(len(a), slots, 1, rank, inputs)
    b_flat = b[0].new_zeros(sum(widths), len(b), slots, rank)
    layer.lora_a_stacked = tuple(a_flat.unbind())
    layer.lora_b_stacked = tuple(
        rows[:, member].transpose(0, 1).unsqueeze(1) for member, rows in enumerate(b_flat.split(widths))
    )
    return a_flat.view(-1, inputs), b_flat.view(sum(widths), -1)


@contextmanager
def plain_products() -> Iterator[None]:
    """Engines that start within compute the LoRA of linear layers so; others, before and after, do not.

    Raises `EngineError` when one started and has no such layer: it would run on vLLM's kernels.
    """
    linear = importlib.import_module("vllm.lora.layers.base_linear").BaseLinearLayerWithLoRA
    rows_of: dict[int, tuple[Any, RowMask]] = {}

    def set_mapping(layer: Any, wrapper: Any) -> None:
        if isinstance(vars(layer).get("punica_wrapper"), LayerGemm):
            return
        if id(wrapper) not in rows_of:
            rows_of[id(wrapper)] = wrapper, _follow(wrapper, layer.lora_a_stacked[0])
        layer.punica_wrapper = LayerGemm(*lay_out(layer), rows_of[id(wrapper)][1])

    with replaced(linear, set_mapping=set_mapping):
        yield
    if not rows_of:
        raise EngineError(
            "plain_lora_gemm=True, but vLLM gave no linear layer its LoRA kernels in this process; leave it out"
        )


def _follow(wrapper: Any, a_stacked: Tensor) -> RowMask:
    """A mask that is kept up to date with a wrapper's batches; `a_stacked` (slots, 1, rank, I) is a layer's."""
    slots, _, rank, _ = a_stacked.shape
    rows = RowMask(wrapper._token_lora_indices.shape[0], slots, rank, a_stacked.device)
    stock_update = wrapper.update_metadata

    def update_metadata(mapping: Any, *args: Any, **kwargs: Any) -> None:
        stock_update(mapping, *args, **kwargs)
        rows.update(wrapper.token_lora_indices, any(lora_id > 0 for lora_id in mapping.index_mapping))

    wrapper.update_metadata = update_metadata
    return rows


def engine_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's arguments, `marked`. Raises `ConfigError` for a sleep mode that would discard the mask, and the zeros
    between the blocks."""
    if arguments.get("enable_sleep_mode") and not compat.slots_outlive_level_2():
        raise ConfigError(
            "plain_lora_gemm=True with enable_sleep_mode=True: this vLLM's sleep level 2 discards the buffers that it "
            "computes with; install 'vllm>=0.33,<0.34' or leave one out"
        )
    return marked(arguments, "plain_lora_gemm")
