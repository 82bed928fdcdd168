"""The algorithm as pure functions: advantages, losses, corrections, and the batch they work on."""

from lora_grpo.grpo.advantages import group_advantages, reward_metrics, weighted_rewards
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.objective import Objective

__all__ = ["Batch", "Objective", "group_advantages", "reward_metrics", "weighted_rewards"]
