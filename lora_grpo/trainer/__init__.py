"""Training: the GRPO loop over a proven engine, from Python or from a config file."""

from lora_grpo.trainer.build import build_trainer as build_trainer
from lora_grpo.trainer.grpo_trainer import GRPOTrainer as GRPOTrainer
