"""Logits to log-probs and entropies in fp32, without a whole fp32 copy of the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 24
"""Logits handled in fp32 at a time: 64 MiB, the peak beside the model's own logits and their gradient."""


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(ids) and the entropy of softmax(logits / temperature), both (B, T), fp32, nats.

    The entropy carries no gradient. Logits that do not fit in one chunk are recomputed in fp32 in the backward pass.
    """
    chunks = [
        _chunk_logprobs(logits, ids, temperature, recompute=logits_BTV.numel() > _CHUNK_ELEMENTS)
        for logits, ids in _chunks(logits_BTV, ids_BT)
    ]
    logp_N, entropy_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return logp_N.view_as(ids_BT), entropy_N.view_as(ids_BT)


def _chunks(logits_BTV: Tensor, ids_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of whole rows, or of a row's tokens, in row-major order.

    Made by `split`, whose backward concatenates once; that of a slice would write all logits again for each chunk.
    """
    _, tokens, vocabulary = logits_BTV.shape
    rows_each = max(1, _CHUNK_ELEMENTS // (tokens * vocabulary))
    tokens_each = max(1, min(tokens, _CHUNK_ELEMENTS // vocabulary))
    for logits, ids in zip(logits_BTV.split(rows_each), ids_BT.split(rows_each), strict=True):
        yield from zip(logits.split(tokens_each, dim=1), ids.split(tokens_each, dim=1), strict=True)


def _chunk_logprobs(logits: Tensor, ids: Tensor, temperature: float, recompute: bool) -> tuple[Tensor, Tensor]:
    if recompute and torch.is_grad_enabled():
        pair: tuple[Tensor, Tensor] = checkpoint(
            _flat_logprobs, logits, ids, temperature, use_reentrant=False, preserve_rng_state=False
        )
        return pair
    return _flat_logprobs(logits, ids, temperature)


def _flat_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperature
    logp = scaled.gather(2, ids.unsqueeze(2)).squeeze(2) - scaled.logsumexp(dim=2)
    with torch.no_grad():
        entropy = torch.special.entr(scaled.softmax(dim=2)).sum(dim=2)
    return logp.flatten(), entropy.flatten()
