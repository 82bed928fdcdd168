"""Training: the GRPO loop over a proven engine, from Python or from a config file."""

from lora_grpo.trainer.build import build_trainer
from lora_grpo.trainer.compare import compare_versions
from lora_grpo.trainer.forking import Fork, fork
from lora_grpo.trainer.grpo_trainer import GRPOTrainer
from lora_grpo.trainer.guards import Guard, LogprobGap, NonFinite, ReferenceKL, RewardCollapse
from lora_grpo.trainer.hub import push_to_hub

__all__ = [
    "Fork",
    "GRPOTrainer",
    "Guard",
    "LogprobGap",
    "NonFinite",
    "ReferenceKL",
    "RewardCollapse",
    "build_trainer",
    "compare_versions",
    "fork",
    "push_to_hub",
]
