"""What a forward and backward hold in memory besides weights, found by a walk through the model without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_grpo.grpo.head import head_bytes
from lora_grpo.grpo_config import GRPOConfig


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The most that the trainer computes at a time: `rows` of a prompt and a completion each, none of them shared."""

    rows: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def largest_batch(config: GRPOConfig, prompt_tokens: int) -> LargestBatch:
    """What a run's settings make of prompts of at most so many tokens."""
    rows, completion_tokens = config.per_device_train_batch_size, config.max_completion_length
    if config.max_tokens_per_micro_batch is not None:
        rows = max(1, config.max_tokens_per_micro_batch // (prompt_tokens + completion_tokens))
    return LargestBatch(rows, prompt_tokens, completion_tokens)


def activation_bytes(model: Any, batch: LargestBatch, dtype: torch.dtype, *, checkpointing: bool) -> int | None:
    """Peak of a forward and backward of `batch` above weights and optimizer; None where no walk is possible.

    `model` is a PEFT model on the meta device, in `dtype`. Attention counts as one that never holds its scores, which
    torch's is on the CPU and on GPUs. A model whose code reads values from its tensors cannot be walked through.
    """
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    layer = model.get_output_embeddings()
    tokens = batch.rows * batch.completion_tokens
    for mask in (_mask(batch), None):
        try:
            kept_bytes, peak_bytes = _walk(model, batch, mask)
        except RuntimeError:
            continue
        return max(peak_bytes, kept_bytes + head_bytes(layer, tokens, dtype))
    return None


def _mask(batch: LargestBatch) -> Tensor:
    """What a padded batch is attended with."""
    return torch.ones((batch.rows, 1, batch.length, batch.length), dtype=torch.bool, device="meta")


def _walk(model: Any, batch: LargestBatch, mask: Tensor | None) -> tuple[int, int]:
    """Bytes that are kept for the backward, and the most at any time."""
    ids_BL = torch.zeros((batch.rows, batch.length), dtype=torch.long, device="meta")
    backbone = model.get_base_model().get_decoder()
    with torch.device("meta"), _attention_without_scores(), _Living(model) as living:
        output = backbone(input_ids=ids_BL, attention_mask=mask, use_cache=False)
        kept_bytes = living.now_bytes
        output[0].sum().backward()
    model.zero_grad()
    return kept_bytes, living.peak_bytes


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that live, the model's own left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._storages:
            self._storages.add(storage._cdata)
            self.now_bytes += storage.nbytes()
            weakref.finalize(storage, partial(self._drop, storage._cdata, storage.nbytes()))

    def _drop(self, storage: int, size_bytes: int) -> None:
        self._storages.discard(storage)
        self.now_bytes -= size_bytes


class _Attention(torch.autograd.Function):
    """What attention keeps that never holds its scores: its inputs, its output, and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _attention_without_scores() -> Iterator[None]:
    """Torch has no such attention on the meta device, and would take the one that holds them."""
    functions = torch.nn.functional
    own = functions.scaled_dot_product_attention
    functions.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = own
