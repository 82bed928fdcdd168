"""The losses of group-relative policy optimisation, formula by formula, and the objective that a configuration names.

Shapes: B rows, T completion tokens. `ratio` and what is made of it are (B, T) with token-level importance sampling
and (B, 1) with sequence-level; both broadcast against (B, T). `advantages_B1` is (B, 1). Inputs hold 0 where masked.

A loss is a sum over tokens, sum_bt weight_bt * loss_bt. The weights hold the normaliser, taken over the whole
optimizer batch (or rollout) and all processes, so a batch cut into micro-batches or processes gives the same gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_grpo.errors import TrainingError
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.processes import Observed, counted, row_means
from lora_grpo.grpo_config import CorrectionMode, GRPOConfig, LossType


class ClipRange(NamedTuple):
    """`low`, `high` as TRL's epsilon and epsilon_high; `delta` bounds the unclipped ratio (arXiv 2505.07291)."""

    low: float
    high: float
    delta: float | None = None


class Size(NamedTuple):
    """Rows, and tokens that count in the loss, over all processes."""

    rows: int
    tokens: int


class Totals(NamedTuple):
    """What normalisers divide by: the size of one optimizer batch, of the rollout it is part of, and a constant."""

    update: Size
    rollout: Size
    max_completion_length: int


# The ratio pi / pi_old: by token (GRPO, arXiv 2402.03300), or by sequence.


def sequence_log_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, 1): the row's mean log-ratio, log of its length-normalised likelihood ratio (GSPO, arXiv 2507.18071)."""
    total_B1 = ((logp_BT - old_logp_BT) * mask_BT).sum(dim=1, keepdim=True)
    return total_B1 / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)


def k3_kl(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """(B, T): the k3 estimate of KL(pi || pi_ref) from pi's samples, exp(d) - d - 1 >= 0 with d = log pi_ref - log pi.

    See http://joschu.net/blog/kl-approx.html and arXiv 2402.03300, eq. 4. Multiplied by the ratio, its gradient is
    the unbiased one of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556)."""
    difference_BT = ref_logp_BT - logp_BT
    return difference_BT.exp() - difference_BT - 1


# The loss of one token.


def clipped_surrogate(ratio: Tensor, logp_BT: Tensor, advantages_B1: Tensor, clip: ClipRange) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), PPO's (arXiv 1707.06347), with high != low as in DAPO (2503.14476)."""
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    return -torch.min(bounded(ratio, clip) * advantages_B1, clipped * advantages_B1)


def cispo_surrogate(ratio: Tensor, logp_BT: Tensor, advantages_B1: Tensor, clip: ClipRange) -> Tensor:
    """-sg(min(r, high)) A log pi: no token loses its gradient (MiniMax-M1, arXiv 2506.13585).

    `high` bounds the ratio itself, not its distance from 1 (arXiv 2510.13786 recommends 5)."""
    return -ratio.clamp(max=clip.high).detach() * advantages_B1 * logp_BT


def bounded(ratio: Tensor, clip: ClipRange) -> Tensor:
    """The ratio, at most `delta`: without it a negative advantage puts no bound on the loss of a large ratio."""
    return ratio if clip.delta is None else ratio.clamp(max=clip.delta)


# Which tokens (or rows) were clipped, under TRL's metric names.


def clip_events(ratio: Tensor, advantages_B1: Tensor, clip: ClipRange) -> dict[str, Tensor]:
    """Where the clip took the gradient away: below with a negative advantage, above with a positive one."""
    low = (bounded(ratio, clip) < 1 - clip.low) & (advantages_B1 < 0)
    high = (bounded(ratio, clip) > 1 + clip.high) & (advantages_B1 > 0)
    return {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}


def cispo_events(ratio: Tensor, advantages_B1: Tensor, clip: ClipRange) -> dict[str, Tensor]:
    return {"cispo_clip_ratio": (ratio > clip.high) & (advantages_B1 > 0)}


# The weight of one token, (B, T): 0 where masked, summing to about 1 over an update.


def row_mean_weights(mask_BT: Tensor, totals: Totals) -> Tensor:
    """Mean over rows of each row's mean (GRPO): a token of a short completion weighs more."""
    return mask_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1) / totals.update.rows


def update_mean_weights(mask_BT: Tensor, totals: Totals) -> Tensor:
    """Mean over the tokens of the optimizer batch (BNPO).

    TRL takes it over each micro-batch of each process, so its gradient depends on how the batch was cut; on one
    micro-batch the two are equal."""
    return mask_BT / max(totals.update.tokens, 1)


def constant_weights(mask_BT: Tensor, totals: Totals) -> Tensor:
    """Sum over tokens, divided by the constant rows * max_completion_length (Dr. GRPO, arXiv 2503.20783)."""
    return mask_BT / (totals.update.rows * totals.max_completion_length)


def rollout_mean_weights(mask_BT: Tensor, totals: Totals) -> Tensor:
    """Sum over tokens, divided by the rollout's mean number of tokens an optimizer batch (DAPO, arXiv 2503.14476).

    With one optimizer batch a rollout this is the mean over its tokens."""
    updates = totals.rollout.rows / totals.update.rows
    return mask_BT * (updates / max(totals.rollout.tokens, 1))


# Correcting for a sampler that is not quite the trainer: vLLM's kernels and rounding give other log-probs. It drew from
# pi_sampler, the loss takes its tokens as drawn from the trainer's pi_old: each token loss is weighted by
# pi_old / pi_sampler (truncated importance sampling, https://fengyao.notion.site/off-policy-rl). Modes and clips are
# TRL's.


def sampling_ratio(
    old_logp_BT: Tensor,
    sampler_logp_BT: Tensor,
    mask_BT: Tensor,
    mode: CorrectionMode,
    clips: tuple[float | None, float],
) -> Tensor:
    """The weight of each token, (B, T), or of each row, (B, 1), by the mode; `clips` are the least and the greatest.

    `token_*` weigh each token by its own ratio, `sequence_*` each row by the product over its tokens. `*_truncate`
    clamps ratios to the clips, `*_mask` drops (weight 0) what lies outside. A token without a sampler log-prob (NaN)
    counts with ratio 1."""
    difference = torch.where(mask_BT, old_logp_BT - sampler_logp_BT, 0.0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=1, keepdim=True)
    ratio = difference.exp()
    bounded = ratio.clamp(*clips)
    return bounded if mode.endswith("truncate") else ratio.where(ratio == bounded, 0.0)


def known_gaps(old_logp_BT: Tensor, sampler_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """|log pi_old - log pi_sampler| of the N tokens that count and that the sampler scored, (N,), nats."""
    return (old_logp_BT - sampler_logp_BT)[mask_BT & ~sampler_logp_BT.isnan()].abs()


class Loss(NamedTuple):
    surrogate: Callable[[Tensor, Tensor, Tensor, ClipRange], Tensor]
    weights: Callable[[Tensor, Totals], Tensor]
    events: Callable[[Tensor, Tensor, ClipRange], dict[str, Tensor]]


LOSSES: dict[LossType, Loss] = {
    "grpo": Loss(clipped_surrogate, row_mean_weights, clip_events),
    "bnpo": Loss(clipped_surrogate, update_mean_weights, clip_events),
    "dr_grpo": Loss(clipped_surrogate, constant_weights, clip_events),
    "dapo": Loss(clipped_surrogate, rollout_mean_weights, clip_events),
    "cispo": Loss(cispo_surrogate, rollout_mean_weights, cispo_events),
}


class Objective:
    """Loss, ratio, clip, KL and mismatch correction of one run."""

    def __init__(self, config: GRPOConfig) -> None:
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.loss, self.clip = LOSSES[config.loss_type], ClipRange(config.epsilon, high, config.delta)
        self.config = config

    def needs_gradient(self, rows: Batch) -> Tensor:
        """(B,) bool: rows that can move the policy; without a KL, those of advantage 0 cannot."""
        moved_B = rows.mask_BT.any(dim=1)
        return moved_B if self.config.beta else moved_B & (rows.advantages_B != 0)

    def value(self, logp_BT: Tensor, rows: Batch, totals: Totals) -> Tensor:
        """These rows' part of the loss of the optimizer batch that `totals` describe: parts add up to the whole."""
        logp_BT = _masked(logp_BT, rows)
        losses = self.loss.surrogate(self.ratio(logp_BT, rows), logp_BT, rows.advantages_B[:, None], self.clip)
        if self.config.vllm_importance_sampling_correction:
            losses = losses * self.correction(rows)
        if self.config.beta:
            losses = losses + self.config.beta * self.kl(logp_BT, rows)
        return (losses * self.loss.weights(rows.mask_BT, totals)).sum()

    def ratio(self, logp_BT: Tensor, rows: Batch) -> Tensor:
        """pi / pi_old, (B, T) by token or (B, 1) by sequence."""
        logp_BT, old_logp_BT = _masked(logp_BT, rows), _masked(rows.old_logp_BT, rows)
        if self.config.importance_sampling_level == "sequence":
            return sequence_log_ratio(logp_BT, old_logp_BT, rows.mask_BT).exp()
        return (logp_BT - old_logp_BT).exp()

    def correction(self, rows: Batch) -> Tensor:
        """`sampling_ratio` of these rows, by the settings."""
        clips = self.config.vllm_importance_sampling_clip_min, self.config.vllm_importance_sampling_clip_max
        mode = self.config.vllm_importance_sampling_mode
        return sampling_ratio(filled(rows.old_logp_BT), rows.sampler_logp_BT, rows.mask_BT, mode, clips)

    def kl(self, logp_BT: Tensor, rows: Batch) -> Tensor:
        """(B, T): k3 estimate of the KL to the reference, times the ratio where that is asked for; 0 where masked."""
        kl_BT = k3_kl(_masked(logp_BT, rows), _masked(rows.ref_logp_BT, rows))
        return kl_BT * self.ratio(logp_BT, rows) if self.config.use_bias_correction_kl else kl_BT

    def observe(self, logp_BT: Tensor, entropy_BT: Tensor, rows: Batch) -> dict[str, Observed]:
        """What TRL logs of an update: entropy, the KL where there is one, and what the clip did."""
        events = self.loss.events(self.ratio(logp_BT, rows), rows.advantages_B[:, None], self.clip)
        means = {"entropy": entropy_BT, **({"kl": self.kl(logp_BT, rows)} if self.config.beta else {}), **events}
        observed = {name: Observed(counted(values, rows.mask_BT), "mean") for name, values in means.items()}
        if "clip_ratio/low_mean" in events:
            lows, highs = events["clip_ratio/low_mean"], events["clip_ratio/high_mean"]
            observed["clip_ratio/low_min"] = Observed(row_means(lows, rows.mask_BT), "min")
            observed["clip_ratio/high_max"] = Observed(row_means(highs, rows.mask_BT), "max")
        return observed

    def observe_sampling(self, rows: Batch) -> dict[str, Observed]:
        """How far the sampler's log-probs are from the trainer's (nats), and the weights that correct for it."""
        old_logp_BT, sampler_logp_BT = filled(rows.old_logp_BT), rows.sampler_logp_BT
        gaps_N = known_gaps(old_logp_BT, sampler_logp_BT, rows.mask_BT)
        observed = {f"sampling/sampling_logp_difference/{how}": Observed(gaps_N, how) for how in ("mean", "max")}
        if self.config.vllm_importance_sampling_correction:
            ratio = counted(self.correction(rows), rows.mask_BT)
            name = "sampling/importance_sampling_ratio"
            observed |= {f"{name}/{how}": Observed(ratio, how) for how in ("min", "mean", "max")}
        return observed


def filled(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TrainingError("the batch lacks log-probs that the objective needs: give it to Policy.prepare first")
    return tensor


def _masked(logp_BT: Tensor | None, rows: Batch) -> Tensor:
    """0 where masked: what stands there may be anything, and 0 * inf is no 0."""
    return torch.where(rows.mask_BT, filled(logp_BT), 0.0)
