"""Trainer and engine share a device: an adapter that crossed devices at each step would cost what merging saves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.engines.fake import FakeEngine
from lora_grpo.errors import ConfigError
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.models import check_same_device
from tests.tiny_trainer import CONFIG, ROWS, share_of_low_bytes


class OnGPU(FakeEngine):
    """One that computes on the first GPU, for all it says."""

    @property
    def device(self) -> Any:
        return torch.device("cuda", 0)


def test_a_trainer_says_where_the_two_are_and_how_to_move(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, num_key_value_heads=2)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=["q_proj"]))
    engine = OnGPU(lambda prompt, version, seed: "a")
    with pytest.raises(ConfigError, match=r"the trainer is on cpu but the engine on cuda:0; .* model.to\('cuda:0'\)"):
        GRPOTrainer(model, share_of_low_bytes, CONFIG, ROWS, engine=engine, run_dir=tmp_path / "run", view=False)


@pytest.mark.parametrize(
    ("trainer", "served", "together"),
    [
        ("cpu", "cpu", True),
        ("cpu", None, True),
        ("meta", "cpu", False),
        ("cpu", "cuda:1", False),
        ("meta", "meta:0", True),
    ],
)
def test_devices_are_compared_with_their_numbers(trainer: str, served: str | None, together: bool) -> None:
    """An engine elsewhere has none; a device without a number is the first."""
    model: Any = nn.Linear(2, 2, device=trainer)
    engine: Any = SimpleNamespace(device=None if served is None else torch.device(served))
    if together:
        check_same_device(model, engine)
    else:
        with pytest.raises(ConfigError, match=f"the trainer is on {trainer} but the engine on {served}"):
            check_same_device(model, engine)
