"""Multimodal checkpoints, of which text alone is trained: the language model under the full checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from lora_grpo.adapters.checks import active_adapter, check_servable
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig
from lora_grpo.engines import compat
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.scoring import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.activations import MicroBatch
from lora_grpo.trainer.planning import plan
from tests.conftest import ENGINE_ARGS
from tests.families import FAMILIES, build, trainer_model
from tests.model_table import CONTROLS, Finding, adapted, deliver
from tests.tiny_models import refill_lora
from tests.tiny_trainer import CONFIG, ROWS, same, share_of_low_bytes, weights

pytestmark = pytest.mark.vllm

FAMILY = "qwen2_5_vl"
"""Layers of its tower have names that those of its language model have."""
WRAPPERS = [name for name, family in FAMILIES.items() if family.vision is not None]
ALL_LINEAR = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
SEQUENCES = [list(range(10 + row, 40 + row)) for row in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(FAMILY, tmp_path_factory.mktemp(FAMILY))


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(base, max_lora_rank=8, **ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_trainers_model_is_the_language_model_under_the_checkpoints_names(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    alone, full = trainer_model(name, tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32")
    within, whole = alone.state_dict(), full.state_dict()
    assert same(within, {key: whole[key] for key in within})
    assert {key for key in whole if ".language_model." in key} == {key for key in within if ".language_model." in key}
    assert teacher_logprobs(alone, SEQUENCES) == teacher_logprobs(full, SEQUENCES)


def test_delivery_and_every_control(base: Path, engine: VLLMEngine, shm_dir: Path) -> None:
    finding = Finding(FAMILY)
    with AdapterStore(shm_dir / "store") as store:
        deliver(finding, adapted(FAMILY, base), engine, store, shm_dir)
    assert len(CONTROLS) == 5
    assert finding.missed == []
    assert finding.gap <= 3 * finding.noise
    assert finding.gap < finding.signal / 3


def test_train_go_back_resume_and_export(base: Path, engine: VLLMEngine, tmp_path: Path, shm_dir: Path) -> None:
    """No tower anywhere but in the full model that the export is loaded into."""

    def trainer(steps: int) -> GRPOTrainer:
        return GRPOTrainer(
            ModelConfig(name=str(base), dtype="float32"),
            share_of_low_bytes,
            CONFIG.replace(total_steps=steps),
            ROWS,
            peft_config=ALL_LINEAR,
            engine=engine,
            keep=KeepConfig(trainer_states=20),
            run_dir=tmp_path / "run",
            store_root=shm_dir / "store",
            view=False,
        )

    first = trainer(2)
    assert not any(name.startswith("visual.") for name, _ in compat.base_parameters(engine._llm))
    assert all(".language_model." in name or "lm_head" in name for name, _ in first.model.named_parameters())
    first.train()
    kept = weights(first)
    head = first.sync.head
    refill_lora(first.model, scale=0.1, seed=1)
    assert not same(weights(first), kept)
    assert first.rollback(to=head).weights == "exact"
    assert same(weights(first), kept)
    first.close()

    second = trainer(3)
    assert second.resume() is not None
    assert same(weights(second), kept)
    second.train()
    assert second.sync.export(second.sync.head, tmp_path / "export") == "exact"
    policy = teacher_logprobs(second.model, SEQUENCES)
    served = engine.logprobs(SEQUENCES, adapter=second.sync.head)
    with second.model.disable_adapter():  # type: ignore[operator, union-attr]
        unadapted = teacher_logprobs(second.model, SEQUENCES)
    second.close()

    full = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
    loaded = PeftModel.from_pretrained(full, tmp_path / "export").eval()
    assert all(".language_model." in name for name in loaded.targeted_module_names)
    assert mean_abs_difference(teacher_logprobs(loaded, SEQUENCES), policy) < 1e-5
    assert mean_abs_difference(policy, unadapted) > 3 * mean_abs_difference(served, policy)


def test_trl_trains_the_language_model(
    base: Path, engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from lora_grpo.integrations import trl
    from tests.test_trl_native import adapter_weights, arguments, native_trainer

    monkeypatch.setattr(trl, "VLLMEngine", lambda model, **_: engine)
    monkeypatch.setattr(engine, "close", lambda: None)
    args = arguments(tmp_path, max_steps=2, eval_strategy="no", save_strategy="no")
    with pytest.raises(ConfigError, match=r"target_modules=None .*'all-linear' is every"):
        native_trainer(str(base), args, peft_config=LoraConfig(r=8))
    trainer = native_trainer(str(base), args, peft_config=ALL_LINEAR)
    assert all(".language_model." in name or "lm_head" in name for name, _ in trainer.model.named_parameters())
    before = adapter_weights(trainer.model)
    trainer.train()
    assert not same(adapter_weights(trainer.model), before)
    assert trainer.rollback(to=1).weights == "exact"
    assert same(adapter_weights(trainer.model), before)
    trainer.close()


def test_all_linear_layers_are_those_of_the_language_model(base: Path) -> None:
    """Without target modules PEFT has no choice of its own here."""
    model = ModelConfig(name=str(base))
    rest: Any = (EngineConfig(), False, MicroBatch(1, 1, 1), None)
    planned = plan(model, LoraConfig(r=8, target_modules=r".*\.(q_proj|up_proj|qkv)"), *rest)
    assert planned.leaves == ["q_proj", "up_proj"]
    with pytest.raises(ConfigError, match=r"target_modules=None .*target_modules='all-linear' is every linear layer"):
        plan(model, LoraConfig(r=8), *rest)


def test_a_full_model_of_the_users_own(base: Path, engine: VLLMEngine, shm_dir: Path) -> None:
    """As the refusal of a tower's layers says that its adapter is to be named."""
    full: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(full, LoraConfig(r=8, target_modules=r"model\.language_model\..*\.(q_proj|up_proj)"))
    assert len(check_servable(model, active_adapter(model))) == 4
    refill_lora(model, scale=0.1, seed=0)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, engine, store)
        assert sync.base_match is not None
        assert any("visual" in name for name in sync.base_match.unread["the engine"])
        version = sync.push(step=0)
        gap = mean_abs_difference(engine.logprobs(SEQUENCES, adapter=version), teacher_logprobs(model, SEQUENCES))
        assert gap <= 3 * sync.noise
