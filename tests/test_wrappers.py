"""Multimodal checkpoints, of which text alone is trained: the language model under the full checkpoint's names."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from lora_grpo.config import ModelConfig
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import teacher_logprobs
from lora_grpo.trainer.models import adapted_leaves
from tests.families import FAMILIES, build, full_model, trainer_model
from tests.tiny_trainer import same

WRAPPERS = [name for name, family in FAMILIES.items() if family.vision is not None]
SEQUENCES = [list(range(10 + row, 40 + row)) for row in range(4)]


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_trainers_model_is_the_language_model_under_the_checkpoints_names(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    alone, full = trainer_model(name, tmp_path), full_model(tmp_path)
    within, whole = alone.state_dict(), full.state_dict()
    assert same(within, {key: whole[key] for key in within})
    assert {key for key in whole if ".language_model." in key} == {key for key in within if ".language_model." in key}
    assert teacher_logprobs(alone, SEQUENCES) == teacher_logprobs(full, SEQUENCES)


def test_all_linear_layers_are_those_of_the_language_model(tmp_path: Path) -> None:
    """Layers of this tower have names that those of the language model have; PEFT has no choice of its own here."""
    model = ModelConfig(name=str(build("qwen2_5_vl", tmp_path)))
    assert adapted_leaves(model, LoraConfig(target_modules=r".*\.(q_proj|up_proj|qkv)")) == ["q_proj", "up_proj"]
    with pytest.raises(ConfigError, match=r"target_modules=None .*target_modules='all-linear' is every linear layer"):
        adapted_leaves(model, LoraConfig(r=8))
