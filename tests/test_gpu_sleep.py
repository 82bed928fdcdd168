"""Sleep mode where there is one: with `--device cuda:0`. Its logic is tested without in test_sleep.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.engines import compat
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import mean_abs_difference
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

SEQUENCES = [list(range(10, 40)), list(range(60, 100))]


@pytest.fixture
def engine(device: str, tmp_path: Path) -> Iterator[VLLMEngine]:
    if device == "cpu":
        pytest.skip("vLLM sleeps on GPUs only")
    settings = {**ENGINE_ARGS, "gpu_memory_utilization": 0.05, "enable_sleep_mode": True}
    engine = VLLMEngine(tiny_model("llama", tmp_path / "model"), max_lora_rank=16, **settings)
    yield engine
    engine.close()


def test_memory_is_given_back_and_versions_are_what_they_were(
    engine: VLLMEngine, device: str, tmp_path: Path, shm_dir: Path, record_property: Any
) -> None:
    model = tiny_lora(load_model(tmp_path / "model"), r=16)
    form = ServingForm(model, "default", torch.bfloat16)
    with AdapterStore(shm_dir / "store") as store:
        versions = []
        for seed in range(3):
            refill_lora(model, scale=0.3, seed=seed)
            versions.append(store.publish(form.files(), step=seed))
            engine.load(versions[-1])
        asked = [None, *versions]
        before = [engine.logprobs(SEQUENCES, adapter=adapter) for adapter in asked]
        awake = torch.cuda.mem_get_info(device)[0]
        engine.sleep()
        freed = torch.cuda.mem_get_info(device)[0] - awake
        engine.wake_up()
        record_property("freed_bytes", freed)
        assert freed > 1 << 30
        assert set(engine.loaded()) == set(versions)
        after = [engine.logprobs(SEQUENCES, adapter=adapter) for adapter in asked]
        assert max(mean_abs_difference(a, b) for a, b in zip(after, before, strict=True)) < 0.02
        assert min(mean_abs_difference(after[0], changed) for changed in after[1:]) > 0.2
        if compat.vllm_release() < (0, 33):
            with pytest.raises(ConfigError, match="level 2 on vLLM"):
                engine.sleep(level=2)
            for version in versions:
                engine.unload(version)
        if compat.vllm_release() < (0, 28):
            with pytest.raises(ConfigError, match="has no way back"):
                engine.sleep(level=2)
            return
        engine.sleep(level=2)
        engine.wake_up()
        engine.load(versions[0])
        assert mean_abs_difference(engine.logprobs(SEQUENCES, adapter=versions[0]), before[1]) < 0.02
