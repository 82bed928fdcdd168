"""What training on a base and serving it take of memory, told by a walk through the model without any."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_grpo.adapters.peft_form.checks import Scheme
from lora_grpo.config import EngineConfig
from lora_grpo.engines.compat.patching import replaced
from lora_grpo.grpo.head import head_bytes
from lora_grpo.grpo.packing import Span, in_spans, pack, pays, refusal, sizes
from lora_grpo.trainer.models import lora_rank

ADAM_BYTES = 4 + 4 + 4 + 4  # fp32 weight, gradient and two moments of each adapter parameter
_QUANTIZED_BYTES: dict[Scheme | None, tuple[float | None, float | None]] = {
    "nf4": (1 / 2 + 1 / 64 + 4 / (64 * 256), 1 / 2 + 4 / 64),
    "fp8": (None, 1 + 4 / (128 * 128)),
    "w4a16": (None, 1 / 2 + 2 / 128),
}
"""A weight's in trainer and engine, scales included; None: the dtype's. vLLM keeps nf4's scales in fp32. On a CPU the
engine's fp8 and int4 are plain values in its dtype (`engines/packing.py`)."""

_SMALLER = {  # by what each part gets smaller
    "trainer base": "hold it in half precision (model.dtype='bfloat16') or once with the engine (share_base_weights)",
    "adapter and optimizer": "lower the adapter's rank",
    "activations": "lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much), shorten "
    "max_completion_length, or set gradient_checkpointing=true",
    "engine base": "serve it in half precision (engine.dtype='bfloat16')",
    "adapter slots": "lower max_lora_rank or max_loras",
    "kv": "lower gpu_memory_utilization on a GPU, VLLM_CPU_KVCACHE_SPACE on a CPU",
}


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The most that the trainer computes at a time: `rows` of a prompt and a completion each."""

    rows: int
    prompt_tokens: int
    completion_tokens: int
    group: int = 1  # rows that have the same prompt, which a model that takes packed rows computes once

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def sequences(self) -> list[list[int]]:
        """Token ids, `length` a row."""
        # Groups do not begin where batches do: unless one divides the other, a batch can hold one prompt more.
        first = 0 if self.rows % self.group == 0 or self.group % self.rows == 0 else self.group - 1
        prompts = [(first + row) // self.group for row in range(self.rows)]
        return [[prompt] * self.prompt_tokens + [0] * self.completion_tokens for prompt in prompts]


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    trainer_base_bytes: int
    adapter_and_optimizer_bytes: int
    activations_bytes: int | None  # None: the model could not be walked through; see `activation_bytes`
    engine_base_bytes: int
    adapter_slots_bytes: int
    kv_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {mib(size_bytes)}" for name, size_bytes in self.parts().items())
        unknown = " without activations, which cannot be estimated" if self.activations_bytes is None else ""
        return f"{mib(self.total_bytes)}{unknown} ({parts})"

    def parts(self) -> dict[str, int]:
        """Those that are known, by a name for people."""
        known = {name: size_bytes for name, size_bytes in asdict(self).items() if size_bytes is not None}
        return {name.removesuffix("_bytes").replace("_", " "): size_bytes for name, size_bytes in known.items()}

    def what_helps(self) -> str:
        return _SMALLER[max(self.parts().items(), key=itemgetter(1))[0]]


def mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def engine_dtype(config: EngineConfig) -> torch.dtype:
    """ "auto" is a half-precision one whatever the checkpoint has: vLLM serves fp32 checkpoints in one too."""
    return torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)


def estimate_memory(
    model: Any, batch: LargestBatch, config: EngineConfig, checkpointing: bool, shared_base: bool, scheme: Scheme | None
) -> MemoryEstimate:
    """Of a PEFT model on the meta device, in its base's dtype, that learns from `batch` at a time; no KV cache. With
    `shared_base` the trainer's base is the engine's. `scheme` is how linear layers are quantized."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    head, layers = model.get_output_embeddings(), model.named_modules()
    linear = [layer for name, layer in layers if isinstance(layer, nn.Linear) and ".lora_" not in name]
    quantized = sum(layer.weight.numel() for layer in linear if layer is not head) if scheme else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = sum(p.numel() for p in model.parameters()) - trained - quantized
    trainer_bytes, engine_bytes = _QUANTIZED_BYTES.get(scheme, (None, None))
    served, rank = engine_dtype(config), config.max_lora_rank or lora_rank(model)
    slots = config.max_loras * rank * sum(layer.in_features + layer.out_features for layer in adapted)

    def base_bytes(dtype: torch.dtype, each: float | None) -> int:
        return plain * dtype.itemsize + int(quantized * (each or dtype.itemsize))

    return MemoryEstimate(
        trainer_base_bytes=0 if shared_base else base_bytes(head.weight.dtype, trainer_bytes),
        adapter_and_optimizer_bytes=trained * ADAM_BYTES,
        activations_bytes=activation_bytes(model, batch, checkpointing),
        engine_base_bytes=base_bytes(served, engine_bytes),
        adapter_slots_bytes=slots * served.itemsize,
    )


# Activations.


def activation_bytes(model: Any, batch: LargestBatch, checkpointing: bool) -> int | None:
    """Peak of a forward and backward of `batch` above weights and optimizer; None for a model whose code reads values
    from its tensors. Attention counts as one that never holds its scores, which torch's is on the CPU and on GPUs."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    head = head_bytes(model.get_output_embeddings(), batch.rows * batch.completion_tokens)
    for inputs, spans in _ways(model, batch):
        try:
            kept_bytes, peak_bytes = _walk(model, inputs, spans)
        except RuntimeError:
            continue
        return max(peak_bytes, kept_bytes + head)
    return None


def _ways(model: Any, batch: LargestBatch) -> Iterator[tuple[dict[str, Any], Sequence[Span] | None]]:
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


def _walk(model: Any, inputs: dict[str, Any], spans: Sequence[Span] | None) -> tuple[int, int]:
    """Bytes that are kept for the backward, and the most at any time."""
    backbone, there = model.get_base_model().get_decoder(), in_spans(model, spans) if spans else nullcontext()
    attention = replaced(nn.functional, scaled_dot_product_attention=_attend)
    with torch.device("meta"), attention, there, _Living(model) as living:
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage._cdata not in self._storages:
                self._storages.add(storage._cdata)
                self.now_bytes += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return result

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


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Torch has no such attention on the meta device, and would take the one that holds its scores."""
    return _Attention.apply(query, key, value)
