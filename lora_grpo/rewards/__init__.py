"""Reward functions: TRL's signature, some ready-made ones, and the room that calls them."""

from lora_grpo.rewards.call import Patience, RewardContext, RewardFunction
from lora_grpo.rewards.ready import completion_text, exact, format, load_reward, numeric, regex
from lora_grpo.rewards.scoring import check_columns, reward_names, score

__all__ = ["Patience", "RewardContext", "RewardFunction", "check_columns", "completion_text", "exact", "format"]
__all__ += ["load_reward", "numeric", "regex", "reward_names", "score"]
