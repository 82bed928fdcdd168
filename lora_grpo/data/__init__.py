"""Prompts: where they come from, and in which order a run uses them."""

from lora_grpo.data.prompts import RESERVED_COLUMNS, PromptDataset, PromptSampler, load_data, load_prompts
from lora_grpo.data.reading import Rows

__all__ = ["RESERVED_COLUMNS", "PromptDataset", "PromptSampler", "Rows", "load_data", "load_prompts"]
