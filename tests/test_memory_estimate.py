"""What a run is said to need, from a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.bench import shapes
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.errors import ConfigError
from lora_grpo.trainer.memory import estimate_memory, require_memory
from lora_grpo.trainer.models import expects_one_copy, planned_memory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_model("tiny", tmp_path_factory.mktemp("shapes") / "tiny")


def estimate(model: Path, **changes: Any) -> Any:
    plain: dict[str, Any] = {
        "rank": 8,
        "targets": {"o_proj"},
        "slots": 2,
        "max_lora_rank": 8,
        "trainer_dtype": torch.float32,
        "engine_dtype": torch.bfloat16,
        "kv_tokens": 10,
    }
    return estimate_memory(model, **{**plain, **changes})


def test_the_parts_by_hand(tiny: Path) -> None:
    """Four layers of 128: o_proj is 128 x 128, keys and values are 2 heads of 32."""
    found = estimate(tiny)
    assert found.engine_base_bytes == 2 * found.trainer_base_bytes / 4
    assert found.adapter_and_optimizer_bytes == 4 * 8 * (128 + 128) * 16
    assert found.kv_bytes == 10 * 2 * 4 * 2 * 32 * 2


def test_a_shared_base_is_held_once(tiny: Path) -> None:
    own, shared = estimate(tiny), estimate(tiny, shared_base=True)
    assert shared.total_bytes == own.total_bytes - own.trainer_base_bytes
    assert shared.engine_base_bytes == own.engine_base_bytes
    with pytest.raises(ConfigError, match="the run needs"):
        require_memory(own, own.total_bytes - 1, "cpu")
    require_memory(shared, own.total_bytes - 1, "cpu")


def test_a_run_that_shares_plans_with_one_copy(tiny: Path) -> None:
    model, engine = ModelConfig(name=str(tiny)), EngineConfig(max_model_len=64)
    assert planned_memory(model, engine, rank=8, leaves=["o_proj"]).trainer_base_bytes > 0
    assert planned_memory(model, engine, rank=8, leaves=["o_proj"], shared_base=True).trainer_base_bytes == 0


def test_auto_plans_with_one_copy_where_it_will_be_taken(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fits only once must not be refused for the copy that "auto" will not make."""
    model, engine = ModelConfig(name=str(tiny)), EngineConfig()
    assert expects_one_copy(True, model, engine)
    assert not expects_one_copy("auto", model, engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert expects_one_copy("auto", model, engine)
    assert not expects_one_copy(False, model, engine)
    assert not expects_one_copy("auto", model.replace(dtype="float32"), engine)
    assert not expects_one_copy("auto", model, EngineConfig(urls=["http://127.0.0.1:8000"]))
    assert not expects_one_copy("auto", torch.nn.Linear(1, 1), engine)
