"""A model's output layer, a block at a time: log-probs, entropies and gradient without whole logits.

Letters: B rows, T scored tokens, N tokens of all rows that are wanted, H hidden size, V vocabulary, C a part of it."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

_BLOCK = defaultdict(lambda: (2048, 8192), cpu=(256, 4096))
"""Tokens and entries of the vocabulary at a time, by device: on a CPU what its cache holds, else 64 MiB of fp32."""

_CHUNK_ELEMENTS = 1 << 24
"""Logits handled in fp32 at a time: 64 MiB, the peak beside the model's own logits and their gradient."""

_CPU_HAS_BF16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

_LEAST = -1e4  # nats below the likeliest token that count as never: what is then 0 stays a number when multiplied
_ROUNDINGS = 2  # how far a logit may be from what scale and cap make of the layer's output, in steps of the largest


class Finish(NamedTuple):
    """What a model does to its output layer's result: cap * tanh(scale * x / cap), and scale * x without a cap."""

    scale: float
    cap: float | None
    vocabulary: int  # entries that are tokens; what lies behind them is padding

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
    unknown way, gives whole logits instead, with a warning."""
    fused = _fused(model, inputs)
    if fused is None:
        logits_BTV = model(**inputs).logits[:, -ids_BT.shape[1] - 1 : -1]
        logp_BT, entropy_BT = token_logprobs(logits_BTV, ids_BT, temperature)
        return logp_BT.where(wanted_BT, 0.0), entropy_BT.where(wanted_BT, 0.0)
    found: list[Tensor] = []

    def score(layer: nn.Linear, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Instead of the layer, which then computes one token."""
        hidden_NH = arguments[0][:, -ids_BT.shape[1] - 1 : -1][wanted_BT]
        head = _Head(layer.weight, layer.bias, finish, temperature)
        for values_N in _Scores.apply(hidden_NH, ids_BT[wanted_BT], head):
            found.append(torch.zeros(ids_BT.shape, device=values_N.device).masked_scatter(wanted_BT, values_N))
        return (arguments[0][:, -1:], *arguments[1:])

    layer, finish = fused
    with layer.register_forward_pre_hook(score):
        output = model(**inputs)
    logp_BT, entropy_BT = found
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        # FSDP2 prepares a backward where the gradient enters by the model's output.
        logp_BT = logp_BT + (output.logits.sum() * 0).nan_to_num()
    return logp_BT, entropy_BT


class _Head(NamedTuple):
    weight_VH: Tensor
    bias_V: Tensor | None
    finish: Finish
    temperature: float

    def score(self, hidden_NH: Tensor, ids_N: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """logp_N, entropy_N and, if asked for, d logp / d hidden, (N, H), in fp32.

        One pass over the vocabulary, as FlashAttention goes over keys (https://arxiv.org/abs/2205.14135): sums are kept
        relative to the largest logit so far, and shrink when a larger one comes."""
        lowest = torch.finfo(torch.float32).min
        largest_N = torch.full(ids_N.shape, lowest, device=hidden_NH.device)
        total_N, mean_N, chosen_N = torch.zeros((3, *ids_N.shape), device=hidden_NH.device)
        expected_NH = torch.zeros(hidden_NH.shape, device=hidden_NH.device) if gradient else None
        for start in range(0, self.finish.vocabulary, _BLOCK[hidden_NH.device.type][1]):
            weight_CH, logits_NC = self._logits(hidden_NH, start)
            slope_NC = self.finish.slope(logits_NC)
            if self.temperature != 1:
                logits_NC.div_(self.temperature)
            here_N = (ids_N >= start) & (ids_N < start + len(weight_CH))
            at_N1 = (ids_N - start).clamp(0, len(weight_CH) - 1).unsqueeze(1)
            chosen_N = torch.where(here_N, logits_NC.gather(1, at_N1).squeeze(1), chosen_N)
            before_N, largest_N = largest_N, torch.maximum(largest_N, logits_NC.amax(dim=1)).clamp(min=lowest)
            shrink_N = (before_N - largest_N).exp()
            odds_NC = logits_NC.sub_(largest_N.unsqueeze(1)).clamp_(min=_LEAST).exp()
            mean_N = shrink_N * (mean_N + (before_N - largest_N).clamp(min=_LEAST) * total_N)
            mean_N += torch.linalg.vecdot(odds_NC, logits_NC)
            total_N = shrink_N * total_N + odds_NC.sum(dim=1)
            if expected_NH is not None:
                if isinstance(slope_NC, Tensor) or slope_NC != 1:
                    odds_NC.mul_(slope_NC)
                expected_NH.mul_(shrink_N.unsqueeze(1)).add_(odds_NC.to(weight_CH.dtype) @ weight_CH)
        logp_N, entropy_N = chosen_N - largest_N - total_N.log(), total_N.log() - mean_N / total_N
        if expected_NH is None:
            return logp_N, entropy_N, None
        own_NH = self.weight_VH[ids_N].float() * self.finish.slope(chosen_N.unsqueeze(1) * self.temperature)
        return logp_N, entropy_N, own_NH.sub_(expected_NH.div_(total_N.unsqueeze(1))).div_(self.temperature)

    def _logits(self, hidden_NH: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The weights of a part of the vocabulary, and the model's logits of it, in fp32.

        A CPU without bf16 products takes up to a hundred times as long for them as for fp32."""
        stop = min(start + _BLOCK[hidden_NH.device.type][1], self.finish.vocabulary)
        weight_CH, bias_C = self.weight_VH[start:stop], None if self.bias_V is None else self.bias_V[start:stop]
        if not (weight_CH.is_cuda or _CPU_HAS_BF16):
            weight_CH, bias_C = weight_CH.float(), None if bias_C is None else bias_C.float()
        raw_NC = nn.functional.linear(hidden_NH.to(weight_CH.dtype), weight_CH, bias_C)
        return weight_CH, self.finish(raw_NC.float())


class _Scores(torch.autograd.Function):
    """logp_N and entropy_N of hidden_NH; the backward is one product, whatever the vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, ids_N: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        gradient, tokens = bool(ctx.needs_input_grad[0]), _BLOCK[hidden_NH.device.type][0]
        logp_N, entropy_N = torch.empty((2, len(ids_N)), device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if gradient else None
        # Autocast would make products of fp32 ones of bf16.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, len(ids_N), tokens):
                here = slice(start, start + tokens)
                logp_N[here], entropy_N[here], slope = head.score(hidden_NH[here], ids_N[here], gradient=gradient)
                if slope_NH is not None and slope is not None:
                    slope_NH[here] = slope
        ctx.save_for_backward(slope_NH)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (slope_NH,) = ctx.saved_tensors
        return slope_NH * gradient_N.unsqueeze(1).to(slope_NH.dtype), None, None


def head_bytes(layer: Any, tokens: int) -> int:
    """What scoring `tokens` with an output layer takes at most, its gradient by the hidden states included."""
    vocabulary, hidden = layer.weight.shape
    rows, entries = _BLOCK["cuda" if torch.cuda.is_available() else "cpu"]
    rows, entries = min(rows, tokens), min(entries, vocabulary)
    return tokens * hidden * layer.weight.dtype.itemsize + 4 * (
        4 * rows * entries + 3 * rows * hidden + entries * hidden
    )


# Where nothing can be fused: whole logits.


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(ids) and the entropy of softmax(logits / temperature), both (B, T), fp32, nats.

    The entropy carries no gradient. Logits that do not fit in one chunk are recomputed in fp32 in the backward pass."""
    score: Callable[..., tuple[Tensor, Tensor]] = _logprobs
    if logits_BTV.numel() > _CHUNK_ELEMENTS and torch.is_grad_enabled():
        score = partial(checkpoint, _logprobs, use_reentrant=False, preserve_rng_state=False)
    tokens = max(1, _CHUNK_ELEMENTS // logits_BTV.shape[2])
    # Split, whose backward concatenates once; that of a slice would write all logits again for each chunk.
    rows = [zip(*(part.split(tokens) for part in row), strict=True) for row in zip(logits_BTV, ids_BT, strict=True)]
    chunks = [score(*chunk, temperature) for row in rows for chunk in row]
    logp_N, entropy_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return logp_N.view_as(ids_BT), entropy_N.view_as(ids_BT)


def _logprobs(logits_NV: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled_NV = logits_NV.float() / temperature
    logp_N = scaled_NV.gather(1, ids_N.unsqueeze(1)).squeeze(1) - scaled_NV.logsumexp(dim=1)
    with torch.no_grad():
        entropy_N = torch.special.entr(scaled_NV.softmax(dim=1)).sum(dim=1)
    return logp_N, entropy_N


# What can be fused.


def _fused(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[nn.Linear, Finish] | None:
    """The model's output layer, and what the model makes of its result, if the layer is a plain one, frozen, and called
    as it stands, and the rest is known; else a warning says why not."""
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    layer = embeddings() if embeddings else None
    if not isinstance(layer, nn.Module):
        return None
    if any(parameter.requires_grad for parameter in layer.parameters()):
        reason = "it is trained"
    elif not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        reason = "it is not a plain linear layer"
    elif hasattr(model, "_orig_mod") or any(getattr(one, "_compiled_call_impl", None) for one in model.modules()):
        reason = "the model is compiled"
    else:
        if layer not in _FINISHES:
            _FINISHES[layer] = _measured(model, layer, inputs["input_ids"][:1, -2:])
        if (finish := _FINISHES[layer]) is not None:
            return layer, finish
        reason = f"how {type(model).__name__} goes on from it could not be told"
    warnings.warn(f"{type(layer).__name__} makes all logits at once, which needs memory: {reason}", stacklevel=3)
    return None


def _measured(model: nn.Module, layer: nn.Module, ids_BL: Tensor) -> Finish | None:
    """How the model's logits come from its layer's output, seen on two tokens and true for all of them."""
    seen: list[Tensor] = []
    watched = layer.register_forward_hook(lambda _, __, raw: seen.append(raw))
    devices = [ids_BL.device] if ids_BL.device.type == "cuda" else []
    with watched, torch.no_grad(), torch.random.fork_rng(devices):
        final_BLV = model(input_ids=ids_BL, use_cache=False).logits
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 3:
        return None
    raw_BLV, eps = seen[0][..., : final_BLV.shape[-1]].float(), torch.finfo(final_BLV.dtype).eps
    final_BLV = final_BLV.float()
    largest = final_BLV[final_BLV.isfinite()].abs().amax() if final_BLV.isfinite().any() else 0.0
    for finish in _candidates(model, final_BLV.shape[-1]):
        made_BLV = finish(raw_BLV.clone())
        near_BLV = (made_BLV - final_BLV).abs() <= _ROUNDINGS * eps * largest
        if ((made_BLV == final_BLV) | near_BLV).all():
            return finish
    return None


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
