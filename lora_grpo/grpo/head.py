"""A model's output layer, a chunk of tokens at a time: log-probs, entropies and gradient without whole logits.

Letters: B rows, T scored tokens, N tokens of all rows that are wanted, H hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lora_grpo.grpo.logprobs import token_logprobs

_CHUNK_ELEMENTS = 1 << 24
"""Logits at a time: 64 MiB of fp32."""

_CPU_HAS_BF16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

_ROUNDINGS = 2
"""How far a logit may be from what a scale and a cap make of the layer's output, in steps of the largest one."""


class Finish(NamedTuple):
    """What a model does to its output layer's result: cap * tanh(scale * x / cap), and scale * x without a cap."""

    scale: float
    cap: float | None
    vocabulary: int
    """Entries that are tokens; what lies behind them is padding."""

    def __call__(self, raw_NV: Tensor) -> Tensor:
        """In place."""
        if self.cap is None:
            return raw_NV.mul_(self.scale) if self.scale != 1 else raw_NV
        return raw_NV.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """Its derivative, from its result."""
        return self.scale if self.cap is None else self.scale * (1 - (logits_NV / self.cap).square())


_FINISHES: WeakKeyDictionary[nn.Module, Finish | None] = WeakKeyDictionary()
"""By output layer. None: how its model finishes the logits could not be told."""


def completion_scores(
    model: nn.Module, inputs: Mapping[str, Any], ids_BT: Tensor, wanted_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p(ids) and the entropy of the model at `temperature`, both (B, T), fp32, nats; 0 where not wanted.

    `inputs` are the model's; its last T + 1 positions predict `ids_BT`, and one more. The entropy has no gradient.

    The output layer is frozen, so the gradient of each log-prob by the hidden state is formed with it, and only that
    is kept: (N, H) in place of (N, V). A layer that is trained or compiled, or whose logits the model finishes in an
    unknown way, gives whole logits instead, with a warning.
    """
    layer = _output_layer(model)
    finish = _finish(model, layer, inputs) if layer is not None else None
    if layer is None or finish is None:
        logits_BTV = model(**inputs).logits[:, -ids_BT.shape[1] - 1 : -1]
        logp_BT, entropy_BT = token_logprobs(logits_BTV, ids_BT, temperature)
        return logp_BT.where(wanted_BT, 0.0), entropy_BT.where(wanted_BT, 0.0)
    with _scoring(layer, finish, ids_BT, wanted_BT, temperature) as found:
        output = model(**inputs)
    logp_BT, entropy_BT = found
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        # FSDP2 prepares a backward where the gradient enters by the model's output.
        logp_BT = logp_BT + (output.logits.sum() * 0).nan_to_num()
    return logp_BT, entropy_BT


@contextmanager
def _scoring(
    layer: nn.Module, finish: Finish, ids_BT: Tensor, wanted_BT: Tensor, temperature: float
) -> Iterator[list[Tensor]]:
    """What the layer is called on is scored and goes to the list; the layer itself then computes one token."""
    found: list[Tensor] = []

    def score(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_NH = arguments[0][:, -ids_BT.shape[1] - 1 : -1][wanted_BT]
        head = _Head(_computing(layer), finish, temperature)
        scores_N: tuple[Tensor, Tensor] = _Scores.apply(hidden_NH, ids_BT[wanted_BT], head)
        for values_N in scores_N:
            empty_BT = torch.zeros(ids_BT.shape, device=values_N.device)
            found.append(empty_BT.masked_scatter(wanted_BT, values_N))
        return (arguments[0][:, -1:], *arguments[1:])

    handle = layer.register_forward_pre_hook(score)
    try:
        yield found
    finally:
        handle.remove()


def _computing(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the layer computes, without its hooks.

    A CPU that has no bf16 products takes up to a hundred times as long for them: there the weights are made fp32 once.
    """
    if type(layer) is not nn.Linear or layer.weight.dtype != torch.bfloat16 or layer.weight.is_cuda or _CPU_HAS_BF16:
        forward: Callable[[Tensor], Tensor] = layer.forward
        return forward
    weight_VH, bias_V = layer.weight.float(), None if layer.bias is None else layer.bias.float()

    def product(hidden_NH: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(hidden_NH.float(), weight_VH, bias_V)

    return product


@dataclass(frozen=True)
class _Head:
    compute: Callable[[Tensor], Tensor]
    finish: Finish
    temperature: float

    def chunk(self, hidden_NH: Tensor, ids_N: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """logp_N, entropy_N and, if asked for, d logp / d hidden, (N, H)."""
        with torch.set_grad_enabled(gradient):
            hidden_NH = hidden_NH.detach().requires_grad_(gradient)
            raw_NV = self.compute(hidden_NH)[:, : self.finish.vocabulary]
        with torch.no_grad():
            finished_NV = self.finish(raw_NV.detach().float())
            slope = self.finish.slope(finished_NV) if gradient else 1.0
            logits_NV = finished_NV.div_(self.temperature) if self.temperature != 1 else finished_NV
            logits_NV.sub_(logits_NV.amax(dim=1, keepdim=True))
            at_N1 = ids_N.unsqueeze(1)
            chosen_N = logits_NV.gather(1, at_N1).squeeze(1)
            weights_NV = logits_NV.exp()
            total_N = weights_NV.sum(dim=1)
            entropy_N = total_N.log() - torch.linalg.vecdot(weights_NV, logits_NV) / total_N
            if not entropy_N.isfinite().all():
                # A token that cannot come: 0 * -inf is no 0.
                entropy_N = torch.special.entr(weights_NV / total_N.unsqueeze(1)).sum(dim=1)
            logp_N = chosen_N - total_N.log()
            if not gradient:
                return logp_N, entropy_N, None
            down_NV = weights_NV.div_(-total_N.unsqueeze(1))
            down_NV.scatter_add_(1, at_N1, torch.ones_like(chosen_N).unsqueeze(1))
            down_NV.mul_(slope).div_(self.temperature)
        # Autocast would make a product of fp32 one of bf16 again.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            (gradient_NH,) = torch.autograd.grad(raw_NV, hidden_NH, down_NV.to(raw_NV.dtype))
        return logp_N, entropy_N, gradient_NH


class _Scores(torch.autograd.Function):
    """logp_N and entropy_N of hidden_NH; the backward is one product, whatever the vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, ids_N: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        gradient = bool(ctx.needs_input_grad[0])
        tokens = max(1, _CHUNK_ELEMENTS // head.finish.vocabulary)
        logp_N, entropy_N = torch.empty((2, len(ids_N)), device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if gradient else None
        for start in range(0, len(ids_N), tokens):
            here = slice(start, start + tokens)
            logp_N[here], entropy_N[here], slope = head.chunk(hidden_NH[here], ids_N[here], gradient=gradient)
            if slope_NH is not None and slope is not None:
                slope_NH[here] = slope
        if slope_NH is not None:
            ctx.save_for_backward(slope_NH)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (slope_NH,) = ctx.saved_tensors
        return slope_NH * gradient_N.unsqueeze(1).to(slope_NH.dtype), None, None


def head_bytes(layer: Any, tokens: int, dtype: torch.dtype) -> int:
    """What scoring `tokens` with an output layer takes at most, its gradient by the hidden states included."""
    vocabulary, hidden = layer.weight.shape
    in_fp32 = dtype == torch.float32 or not (torch.cuda.is_available() or _CPU_HAS_BF16)
    copy_bytes = vocabulary * hidden * 4 if in_fp32 and dtype != torch.float32 else 0
    # Three of the vocabulary's size at a time: logits, their exponentials, the products of both.
    each_bytes = 3 * 4 if in_fp32 else 3 * 4 + dtype.itemsize
    elements = min(tokens * vocabulary, max(_CHUNK_ELEMENTS, vocabulary))
    return tokens * hidden * dtype.itemsize + elements * each_bytes + copy_bytes


# What can be fused.


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The model's output layer, if it is frozen, bare and called as it stands."""
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    layer = embeddings() if embeddings else None
    if not isinstance(layer, nn.Module) or isinstance(layer, BaseTunerLayer):
        return None
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return None if trained or compiled or hasattr(model, "_orig_mod") else layer


def _finish(model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any]) -> Finish | None:
    if layer not in _FINISHES:
        _FINISHES[layer] = _measured(model, layer, inputs["input_ids"][:1, -2:])
        if _FINISHES[layer] is None:
            warnings.warn(
                f"{type(layer).__name__} makes whole logits, which takes memory: how {type(model).__name__} goes on "
                "from its output layer could not be told",
                stacklevel=2,
            )
    return _FINISHES[layer]


def _measured(model: nn.Module, layer: nn.Module, ids_BL: Tensor) -> Finish | None:
    """How the model's logits come from its layer's output, seen on two tokens and true for all of them."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, raw: seen.append(raw))
    devices = [ids_BL.device] if ids_BL.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            final_BLV = model(input_ids=ids_BL, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 3:
        return None
    raw_BLV = seen[0][..., : final_BLV.shape[-1]].float()
    return next(
        (finish for finish in _candidates(model, final_BLV.shape[-1]) if _explains(finish, raw_BLV, final_BLV)), None
    )


def _candidates(model: nn.Module, vocabulary: int) -> Iterator[Finish]:
    """By the names that configurations have for it: Gemma's cap; Granite's, Cohere's and Falcon-H1's scales."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    yield Finish(1.0, cap, vocabulary)
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if value := getattr(text, name, None):
            yield Finish(1 / value, cap, vocabulary)
            yield Finish(value, cap, vocabulary)


def _explains(finish: Finish, raw_BLV: Tensor, final_BLV: Tensor) -> bool:
    final, made = final_BLV.float(), finish(raw_BLV.clone())
    largest = final[final.isfinite()].abs().amax() if final.isfinite().any() else 0.0
    most = _ROUNDINGS * torch.finfo(final_BLV.dtype).eps * largest
    return bool(((made == final) | ((made - final).abs() <= most)).all())
