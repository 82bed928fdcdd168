"""A trainer on the tiny Llama: seconds a run, every part real but the purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_grpo.config import KeepConfig
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.trainer import GRPOTrainer
from tests.tiny_models import load_model, tiny_lora

CONFIG = GRPOConfig(
    seed=3,
    total_steps=9,
    num_generations=4,
    generation_batch_size=16,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_completion_length=6,
    learning_rate=2e-3,
    canary_every=100,
)
ROWS = [{"prompt": f"{chr(97 + index)} is letter {index}: "} for index in range(24)]


def share_of_low_bytes(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that any model can raise, and that differs within nearly every group."""
    return [sum(ord(letter) < 128 for letter in text) / max(1, len(text)) for text in completions]


def tiny_trainer(base: Path, engine: Any, run: Path, config: GRPOConfig = CONFIG, **settings: Any) -> GRPOTrainer:
    """A trainer on the tiny Llama in `base`, its adapter the same for every call."""
    arguments: dict[str, Any] = {
        "reward_funcs": share_of_low_bytes,
        "train_dataset": ROWS,
        "keep": KeepConfig(trainer_states=20),
        "view": False,
        **settings,
    }
    model = tiny_lora(load_model(base), r=8, scale=0.02)
    return GRPOTrainer(model, arguments.pop("reward_funcs"), config, engine=engine, run_dir=run, **arguments)


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.policy.parameters.items()}


def moments(trainer: GRPOTrainer) -> list[torch.Tensor]:
    """Every tensor of the optimizer's state, in a fixed order."""
    states = trainer.policy.optimizer.state_dict()["state"]
    return [states[index][name].clone() for index in sorted(states) for name in sorted(states[index])]


def same(left: Any, right: Any) -> bool:
    """Equal to the bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
