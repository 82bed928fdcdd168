"""Sweeps: many settings of one run as a population, with selection among them."""

from lora_grpo.trainer.sweeping.grid import Trial, is_swept, trials_of
from lora_grpo.trainer.sweeping.plan import SweepPlan
from lora_grpo.trainer.sweeping.selection import halving_losers, perturbed, score, take_over, takeovers
from lora_grpo.trainer.sweeping.sweep import Sweep

__all__ = [
    "Sweep",
    "SweepPlan",
    "Trial",
    "halving_losers",
    "is_swept",
    "perturbed",
    "score",
    "take_over",
    "takeovers",
    "trials_of",
]
