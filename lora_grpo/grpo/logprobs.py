"""Logits to log-probs and entropies in fp32, without a whole fp32 copy of the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 24
"""Logits handled in fp32 at a time: 64 MiB, the peak beside the model's own logits and their gradient."""


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(ids) and the entropy of softmax(logits / temperature), both (B, T), fp32, nats.

    The entropy carries no gradient. Logits that do not fit in one chunk are recomputed in fp32 in the backward pass.
    """
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
