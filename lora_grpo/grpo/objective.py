"""The objective that a configuration names, on a batch, and its metrics."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_grpo.errors import TrainingError
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.losses import LOSSES, ClipRange, Totals, k3_kl, known_gaps, sampling_ratio, sequence_log_ratio
from lora_grpo.grpo.processes import Observed, Reduction, counted, mean, row_means
from lora_grpo.grpo_config import GRPOConfig


class Objective:
    """Loss, ratio, clip, KL and mismatch correction of one run."""

    def __init__(self, config: GRPOConfig) -> None:
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.loss, self.clip = LOSSES[config.loss_type], ClipRange(config.epsilon, high, config.delta)
        self.by_sequence = config.importance_sampling_level == "sequence"
        self.beta, self.unbiased_kl = config.beta, config.use_bias_correction_kl
        correction = partial(
            sampling_ratio,
            mode=config.vllm_importance_sampling_mode,
            clip_max=config.vllm_importance_sampling_clip_max,
            clip_min=config.vllm_importance_sampling_clip_min,
        )
        self.correction = correction if config.vllm_importance_sampling_correction else None
        """None: the sampler is taken at its word."""

    def needs_gradient(self, rows: Batch) -> Tensor:
        """(B,) bool: rows that can move the policy; without a KL, those of advantage 0 cannot."""
        moved_B = rows.mask_BT.any(dim=1)
        return moved_B if self.beta else moved_B & (rows.advantages_B != 0)

    def value(self, logp_BT: Tensor, rows: Batch, totals: Totals) -> Tensor:
        """These rows' part of the loss of the optimizer batch that `totals` describe: parts add up to the whole."""
        return (self.token_losses(logp_BT, rows) * self.loss.weights(rows.mask_BT, totals)).sum()

    def token_losses(self, logp_BT: Tensor, rows: Batch) -> Tensor:
        """(B, T), or (B, 1) where nothing depends on the token."""
        logp_BT = _masked(logp_BT, rows)
        losses = self.loss.surrogate(self.ratio(logp_BT, rows), logp_BT, rows.advantages_B[:, None], self.clip)
        if self.correction:
            losses = losses * self.correction(filled(rows.old_logp_BT), rows.sampler_logp_BT, rows.mask_BT)
        return losses + self.beta * self.kl(logp_BT, rows) if self.beta else losses

    def ratio(self, logp_BT: Tensor, rows: Batch) -> Tensor:
        """pi / pi_old, (B, T) by token or (B, 1) by sequence."""
        logp_BT, old_logp_BT = _masked(logp_BT, rows), _masked(rows.old_logp_BT, rows)
        if self.by_sequence:
            return sequence_log_ratio(logp_BT, old_logp_BT, rows.mask_BT).exp()
        return (logp_BT - old_logp_BT).exp()

    def kl(self, logp_BT: Tensor, rows: Batch) -> Tensor:
        """(B, T): k3 estimate of the KL to the reference, times the ratio where that is asked for; 0 where masked."""
        kl_BT = k3_kl(_masked(logp_BT, rows), _masked(rows.ref_logp_BT, rows))
        return kl_BT * self.ratio(logp_BT, rows) if self.unbiased_kl else kl_BT

    def observe(self, logp_BT: Tensor, entropy_BT: Tensor, rows: Batch) -> dict[str, Observed]:
        """What TRL logs of an update: entropy, the KL where there is one, and what the clip did."""
        observed = {"entropy": mean(entropy_BT, rows.mask_BT)}
        if self.beta:
            observed["kl"] = mean(self.kl(logp_BT, rows), rows.mask_BT)
        events = self.loss.events(self.ratio(logp_BT, rows), rows.advantages_B[:, None], self.clip)
        observed |= {name: mean(event, rows.mask_BT) for name, event in events.items()}
        for name, (source, how) in _EXTREMES.items():
            if source in events:
                observed[name] = Observed(row_means(events[source], rows.mask_BT), how)
        return observed

    def observe_sampling(self, rows: Batch) -> dict[str, Observed]:
        """How far the sampler's log-probs are from the trainer's (nats), and the weights that correct for it."""
        old_logp_BT, sampler_logp_BT = filled(rows.old_logp_BT), rows.sampler_logp_BT
        gaps_N = known_gaps(old_logp_BT, sampler_logp_BT, rows.mask_BT)
        observed = {f"sampling/sampling_logp_difference/{how}": Observed(gaps_N, how) for how in ("mean", "max")}
        if self.correction:
            ratio = self.correction(old_logp_BT, sampler_logp_BT, rows.mask_BT)
            values = counted(ratio, rows.mask_BT)
            prefix = "sampling/importance_sampling_ratio"
            observed |= {f"{prefix}/{how}": Observed(values, how) for how in ("min", "mean", "max")}
        return observed


_EXTREMES: dict[str, tuple[str, Reduction]] = {
    "clip_ratio/low_min": ("clip_ratio/low_mean", "min"),
    "clip_ratio/high_max": ("clip_ratio/high_mean", "max"),
}


def filled(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TrainingError("the batch lacks log-probs that the objective needs: give it to Policy.prepare first")
    return tensor


def _masked(logp_BT: Tensor | None, rows: Batch) -> Tensor:
    """0 where masked: what stands there may be anything, and 0 * inf is no 0."""
    return torch.where(rows.mask_BT, filled(logp_BT), 0.0)
