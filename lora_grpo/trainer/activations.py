"""What a forward and backward hold in memory besides weights, found by a walk through the model without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_grpo.grpo.head import head_bytes
from lora_grpo.grpo.packing import Span, in_spans, pack, pays, refusal, sizes
from lora_grpo.grpo_config import GRPOConfig


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The most that the trainer computes at a time: `rows` of a prompt and a completion each.

    `group` of them have the same prompt, which a model that takes packed rows computes once.
    """

    rows: int
    prompt_tokens: int
    completion_tokens: int
    group: int = 1

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def sequences(self) -> list[list[int]]:
        """Token ids, `length` a row. Groups do not begin where batches do: unless one divides the other, one more
        prompt can be in a batch than its rows would need."""
        fits = self.rows % self.group == 0 or self.group % self.rows == 0
        first = 0 if fits else self.group - 1
        prompts = [(first + row) // self.group for row in range(self.rows)]
        return [[prompt] * self.prompt_tokens + [0] * self.completion_tokens for prompt in prompts]


def largest_batch(config: GRPOConfig, prompt_tokens: int, device: torch.device) -> LargestBatch:
    """What a run's settings make of prompts of at most so many tokens.

    A budget of tokens counts a shared prompt once, and is filled with rows of other groups then. On a GPU there is
    one where none is set: what this many rows take that share nothing.
    """
    rows, group, completion_tokens = config.per_device_train_batch_size, 1, config.max_completion_length
    if config.max_tokens_per_micro_batch is not None:
        rows = max(1, config.max_tokens_per_micro_batch // (prompt_tokens + completion_tokens))
    elif device.type == "cpu":
        group = config.num_generations
    return LargestBatch(rows, prompt_tokens, completion_tokens, group)


def activation_bytes(model: Any, batch: LargestBatch, dtype: torch.dtype, *, checkpointing: bool) -> int | None:
    """Peak of a forward and backward of `batch` above weights and optimizer; None where no walk is possible.

    `model` is a PEFT model on the meta device, in `dtype`. Attention counts as one that never holds its scores, which
    torch's is on the CPU and on GPUs. A model whose code reads values from its tensors cannot be walked through.
    """
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    head = head_bytes(model.get_output_embeddings(), batch.rows * batch.completion_tokens, dtype)
    for inputs, spans in _ways(model, batch):
        try:
            kept_bytes, peak_bytes = _walk(model, inputs, spans)
        except RuntimeError:
            continue
        return max(peak_bytes, kept_bytes + head)
    return None


def _ways(model: Any, batch: LargestBatch) -> Iterator[tuple[dict[str, Any], tuple[Span, ...] | None]]:
    """What the model is given: one packed row where that pays and it takes one, or padded rows with a mask or none."""
    sequences, starts = batch.sequences(), [batch.prompt_tokens] * batch.rows
    if pays(sizes(sequences, starts)) and refusal(model) is None:
        row = pack(sequences, starts)
        there_1N = torch.ones((1, len(row.ids)), dtype=torch.long, device="meta")
        yield {"input_ids": there_1N, "attention_mask": there_1N, "position_ids": there_1N}, row.spans
    ids_BL = torch.zeros((batch.rows, batch.length), dtype=torch.long, device="meta")
    mask = torch.ones((batch.rows, 1, batch.length, batch.length), dtype=torch.bool, device="meta")
    yield {"input_ids": ids_BL, "attention_mask": mask}, None
    yield {"input_ids": ids_BL, "attention_mask": None}, None


def _walk(model: Any, inputs: dict[str, Any], spans: tuple[Span, ...] | None) -> tuple[int, int]:
    """Bytes that are kept for the backward, and the most at any time."""
    backbone, there = model.get_base_model().get_decoder(), in_spans(model, spans) if spans else nullcontext()
    with torch.device("meta"), _attention_without_scores(), there, _Living(model) as living:
        output = backbone(**inputs, use_cache=False)
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
