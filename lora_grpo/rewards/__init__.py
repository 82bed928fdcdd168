"""Reward functions: TRL's signature, some ready-made ones, and the room that calls them."""

from lora_grpo.rewards.call import Patience as Patience
from lora_grpo.rewards.call import RewardContext as RewardContext
from lora_grpo.rewards.call import RewardFunction as RewardFunction
from lora_grpo.rewards.ready import completion_text as completion_text
from lora_grpo.rewards.ready import exact as exact
from lora_grpo.rewards.ready import format as format
from lora_grpo.rewards.ready import load_reward as load_reward
from lora_grpo.rewards.ready import numeric as numeric
from lora_grpo.rewards.ready import regex as regex
from lora_grpo.rewards.scoring import check_columns as check_columns
from lora_grpo.rewards.scoring import reward_names as reward_names
from lora_grpo.rewards.scoring import score as score
