"""Correcting for a sampler that is not quite the trainer: vLLM's kernels and rounding give other log-probs.

The sampler drew from pi_sampler, the loss takes its tokens as drawn from the trainer's pi_old: each token loss is
weighted by pi_old / pi_sampler (truncated importance sampling, https://fengyao.notion.site/off-policy-rl). Modes,
clips and metric names are TRL's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_grpo.grpo_config import CorrectionMode


def sampling_ratio(
    old_logp_BT: Tensor,
    sampler_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    mode: CorrectionMode,
    clip_max: float,
    clip_min: float | None = None,
) -> Tensor:
    """The weight of each token, (B, T), or of each row, (B, 1), by the mode.

    `token_*` weigh each token by its own ratio, `sequence_*` each row by the product over its tokens. `*_truncate`
    clamps ratios to [clip_min, clip_max], `*_mask` drops (weight 0) what lies outside. A token without a sampler
    log-prob (NaN) counts with ratio 1.
    """
    difference = torch.where(mask_BT, old_logp_BT - sampler_logp_BT, 0.0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=1, keepdim=True)
    ratio = difference.exp()
    bounded = ratio.clamp(min=clip_min, max=clip_max)
    return bounded if mode.endswith("truncate") else ratio.where(ratio == bounded, 0.0)


def known_gaps(old_logp_BT: Tensor, sampler_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """|log pi_old - log pi_sampler| of the N tokens that count and that the sampler scored, (N,), nats."""
    return (old_logp_BT - sampler_logp_BT)[mask_BT & ~sampler_logp_BT.isnan()].abs()
