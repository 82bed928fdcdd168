"""Rewards to advantages. P prompts, G completions a group, B = P*G rows, F reward functions.

A NaN reward says that the function does not apply to the row; a row to which none applies has no reward, takes no
part in its group's mean and deviation, and gets advantage 0. Over several processes, rewards are gathered first.
Computed in float64: in float32 the squares of rewards above 1e19 are infinite, and every advantage would be 0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig, ScaleRewards

_EPSILON = 1e-4  # added to the deviation, as TRL does; bounds the advantages of a group of nearly equal rewards


def weighted_rewards(rewards_BF: Tensor, weights_F: Sequence[float] | None = None) -> Tensor:
    """rewards_B: the weighted sum over the functions that apply to each row; NaN where none does."""
    columns = rewards_BF.shape[1]
    if weights_F is not None and len(weights_F) != columns:
        raise ConfigError(f"reward_weights={tuple(weights_F)} must hold one weight for each of {columns} rewards")
    weights = rewards_BF.new_tensor([1.0] * columns if weights_F is None else list(weights_F))
    return (rewards_BF * weights).nansum(dim=1).masked_fill(rewards_BF.isnan().all(dim=1), torch.nan)


def group_advantages(rewards_B: Tensor, num_generations: int, scale_rewards: ScaleRewards = "group") -> Tensor:
    """advantages_B, fp32, = (r - mean of its group) / (deviation + 1e-4); rows of a group are adjacent.

    The deviation (Bessel-corrected) is the group's (GRPO, arXiv 2402.03300, 4.1.2), the whole batch's (arXiv
    2508.08221), or 1 (Dr. GRPO, arXiv 2503.20783: dividing by it favours questions that are too easy or too hard)."""
    if rewards_B.numel() % num_generations:
        raise ConfigError(f"{rewards_B.numel()} rewards are not a multiple of num_generations={num_generations}")
    rewards_PG = rewards_B.double().view(-1, num_generations)
    # Taken from the group's least, equal rewards are 0 to the bit: a mean of them can be off by its rounding.
    above_PG = rewards_PG - rewards_PG.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    centred_PG = above_PG - above_PG.nanmean(dim=1, keepdim=True)
    if scale_rewards != "none":
        centred_PG = centred_PG / (_deviation(rewards_PG, scale_rewards) + _EPSILON)
    return centred_PG.nan_to_num(nan=0.0).flatten().float()


def reward_metrics(rewards_BF: Tensor, names: Sequence[str], config: GRPOConfig) -> dict[str, float]:
    """TRL's reward metrics: `reward`, `reward_std`, `frac_reward_zero_std`, and `rewards/NAME/mean|std` a function.

    `frac_reward_zero_std` is the share of rows in groups (with "batch": in batches) whose rewards are all equal: they
    teach nothing."""
    rewards_B = weighted_rewards(rewards_BF, config.reward_weights)
    deviation = _deviation(rewards_B.double().view(-1, config.num_generations), config.scale_rewards)
    metrics = {
        "reward": rewards_B.nanmean().item(),
        "reward_std": nan_std(rewards_B).item(),
        "frac_reward_zero_std": deviation.isclose(torch.zeros_like(deviation)).float().mean().item(),
    }
    for name, column_B in zip(names, rewards_BF.T, strict=True):
        metrics[f"rewards/{name}/mean"] = column_B.nanmean().item()
        metrics[f"rewards/{name}/std"] = nan_std(column_B).item()
    return metrics


def nan_std(values: Tensor, dim: int = 0) -> Tensor:
    """Bessel-corrected standard deviation of the values that are not NaN; NaN where fewer than two are. Keeps `dim`."""
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()


def _deviation(rewards_PG: Tensor, scale_rewards: ScaleRewards) -> Tensor:
    """A column a group, or one over the batch."""
    return nan_std(rewards_PG.flatten()) if scale_rewards == "batch" else nan_std(rewards_PG, dim=1)
