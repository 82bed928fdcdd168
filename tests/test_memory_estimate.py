"""What a run is said to need, from a config alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from lora_grpo.bench import shapes
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.trainer import room
from lora_grpo.trainer.memory import LargestBatch, MemoryEstimate
from lora_grpo.trainer.models import expects_one_copy
from lora_grpo.trainer.room import Room, Wanted, plan_room
from lora_grpo.trainer.room import estimate as estimate_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_model("tiny", tmp_path_factory.mktemp("shapes") / "tiny")


BATCH = LargestBatch(rows=16, prompt_tokens=64, completion_tokens=448)
BATCHES = {"own": BATCH, "shared": LargestBatch(rows=16, prompt_tokens=384, completion_tokens=128, group=8)}
ADAPTER = LoraConfig(r=8, target_modules=["o_proj"])


def estimate(model: Path, batch: LargestBatch = BATCH, *, shared_base: bool = False) -> MemoryEstimate:
    settings = ModelConfig(name=str(model), dtype="float32")
    return estimate_run(settings, ADAPTER, EngineConfig(), batch, shared_base, False)


def planned(model: Path, free_bytes: int, batch: LargestBatch = BATCH, **changes: Any) -> Room:
    """A run on a device with so many bytes free."""
    steps = GRPOConfig(
        max_completion_length=batch.completion_tokens,
        max_tokens_per_micro_batch=batch.rows * batch.length,
        gradient_checkpointing=changes.get("checkpointing", False),
    )
    wanted = Wanted(ADAPTER, steps, batch.prompt_tokens)
    settings = ModelConfig(name=str(model), dtype="float32")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(room, "available_memory", lambda device: free_bytes)
        found = plan_room(settings, [wanted], EngineConfig(), changes.get("sharing", False), 1)
        found.require()
    return found


def test_the_parts_by_hand(tiny: Path) -> None:
    """Four layers of 128: o_proj is 128 x 128. Two slots of rank 8 in bf16, and a gibibyte for the KV cache."""
    found = estimate(tiny)
    assert found.engine_base_bytes == 2 * found.trainer_base_bytes / 4
    assert found.adapter_and_optimizer_bytes == 4 * 8 * (128 + 128) * 16
    assert found.adapter_slots_bytes == 2 * 4 * 8 * (128 + 128) * 2
    assert found.kv_bytes == 1 << 30


def test_a_shared_base_is_held_once(tiny: Path) -> None:
    own, shared = estimate(tiny), estimate(tiny, shared_base=True)
    assert shared.total_bytes == own.total_bytes - own.trainer_base_bytes
    assert shared.engine_base_bytes == own.engine_base_bytes
    with pytest.raises(ConfigError, match="the run needs"):
        planned(tiny, own.total_bytes - 1)
    assert planned(tiny, own.total_bytes - 1, sharing=True).memory == shared
    assert planned(tiny, own.total_bytes).memory == own


def test_what_does_not_fit_says_what_to_lower(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"activations [\d,.]+ MiB.*lower per_device_train_batch_size"):
        planned(tiny, 2 << 30, LargestBatch(64, 1024, 4096))


def test_a_budget_of_tokens_takes_the_place_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GRPOConfig(per_device_train_batch_size=4, max_completion_length=30)
    monkeypatch.setattr(room, "default_device", lambda: torch.device("cpu"))
    assert Wanted(ADAPTER, plain, 20).batch == LargestBatch(4, 20, 30, group=plain.num_generations)
    for tokens, rows in ((320, 6), (10, 1)):
        assert Wanted(ADAPTER, plain.replace(max_tokens_per_micro_batch=tokens), 20).batch == LargestBatch(rows, 20, 30)
    # There a budget is set at the start, and rows of other groups fill what a shared prompt leaves of it.
    monkeypatch.setattr(room, "default_device", lambda: torch.device("cuda"))
    assert Wanted(ADAPTER, plain, 20).batch == LargestBatch(4, 20, 30)


def test_a_batch_has_the_prompts_that_its_rows_need_and_one_more_where_groups_begin_elsewhere() -> None:
    prompts = {
        (rows, group): len({ids[0] for ids in LargestBatch(rows, 1, 1, group).sequences()})
        for rows, group in [(8, 8), (4, 8), (16, 8), (6, 4), (3, 8), (5, 1)]
    }
    assert prompts == {(8, 8): 1, (4, 8): 1, (16, 8): 2, (6, 4): 3, (3, 8): 2, (5, 1): 5}


def test_activations_are_computed_twice_where_they_would_not_fit(tiny: Path) -> None:
    kept = planned(tiny, 1 << 40, checkpointing=None)
    assert not kept.checkpointing
    free_bytes = kept.memory.total_bytes - 1
    remade = planned(tiny, free_bytes, checkpointing=None)
    assert remade.checkpointing
    assert (remade.memory.activations_bytes or 0) < (kept.memory.activations_bytes or 0)
    assert planned(tiny, free_bytes, checkpointing=True) == remade
    with pytest.raises(ConfigError, match="the run needs"):
        planned(tiny, free_bytes, checkpointing=False)


def test_a_model_that_reads_values_is_estimated_without_them(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, hidden: hidden * hidden.sum().item())
    found = estimate(tiny)
    assert found.activations_bytes is None
    assert "without activations, which cannot be estimated (trainer base" in str(found)


MEASURE = """
import sys
from pathlib import Path
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from lora_grpo.config import GRPOConfig
from lora_grpo.grpo.batch import Batch
from lora_grpo.policy import Policy
from lora_grpo.types import Completion, Group
from tests.test_memory_estimate import ADAPTER, BATCHES

def status(name):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line).split()[1])

directory, twice, batch = sys.argv[1], sys.argv[2] == "twice", BATCHES[sys.argv[3]]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
config = GRPOConfig(
    num_generations=8,
    per_device_train_batch_size=batch.rows,
    gradient_accumulation_steps=1,
    max_completion_length=batch.completion_tokens,
    gradient_checkpointing=twice,
)
policy = Policy(get_peft_model(model, ADAPTER), config)

def update(prompt, tokens):
    made = (Completion("", (7,) * tokens, (-1.0,) * tokens, "length", 1),)
    groups = [Group("", (5 + row // batch.group,) * prompt, made) for row in range(batch.rows)]
    policy.update(Batch.from_groups(groups, torch.linspace(-1, 1, batch.rows)))

update(2, 2)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
update(batch.prompt_tokens, batch.completion_tokens)
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("prompts", BATCHES)
def test_activations_are_what_a_step_takes(tiny: Path, twice: bool, prompts: str) -> None:
    """Within 15 %, with an allocator that gives back what is freed; glibc's own keeps some of it in its heap."""
    model = ModelConfig(name=str(tiny), dtype="float32")
    said = estimate_run(model, ADAPTER, EngineConfig(), BATCHES[prompts], False, twice).activations_bytes
    assert said is not None
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(tiny), "twice" if twice else "once", prompts]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) == pytest.approx(said, rel=0.15)


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
