"""Versions out of a plain `transformers.Trainer`: when they are published, what they hold, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_grpo.adapters.asking.requests import request
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.integrations.callback import PublishAdapter
from tests.tiny_models import load_model, tiny_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

ROWS = [{"input_ids": [70 + i, 71, 72 + i, 73, 74], "labels": [70 + i, 71, 72 + i, 73, 74]} for i in range(8)]
SEQUENCES = [[70, 71, 72, 73, 74, 75], [80, 81, 82, 83, 84, 85]]


class CollectBatch:
    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def fit(model: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    """Train five optimizer steps of two micro-batches each."""
    plain: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**plain, **changes}),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=CollectBatch(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Going(TrainerCallback):
    """Notes the adapter after each step, and goes back once."""

    def __init__(self, publish: PublishAdapter, *, back_at: int = 0, to: int | str = "parent") -> None:
        self.publish, self.back_at, self.to = publish, back_at, to
        self.after: dict[int, dict[str, torch.Tensor]] = {}
        self.moments: dict[int, torch.Tensor] = {}
        self.report: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        if state.global_step == self.back_at:
            self.report = self.publish.rollback(self.to)
        self.after[state.global_step] = weights(model)
        self.moments[state.global_step] = next(iter(optimizer.state.values()))["exp_avg"].clone()


@pytest.mark.vllm
def test_each_version_is_proven_in_the_engine(
    llama_dir: Path, llama_engine: Any, shm_dir: Path, tmp_path: Path
) -> None:
    """The last version makes the engine compute what the trained model computes."""
    model = tiny_lora(load_model(llama_dir), scale=0.05)
    with AdapterStore(shm_dir / "store", archive=tmp_path / "run") as store:
        publish = PublishAdapter(store, engine=llama_engine)
        fit(model, tmp_path, publish)
        assert [version.step for version in store.list()] == [0, 1, 2, 3, 4, 5]
        assert store.head == store.list()[-1]
        served = llama_engine.logprobs(SEQUENCES, adapter=store.head)
        first = teacher_logprobs(model, SEQUENCES)
        assert mean_abs_difference(served, first) < 0.05
        assert publish.sync is not None
        publish.sync.close()
        assert not [version for version in llama_engine.loaded() if version.path.is_relative_to(store.root)]


@pytest.mark.vllm
def test_another_process_loads_what_was_published(
    llama_dir: Path, llama_engine: Any, shm_dir: Path, tmp_path: Path
) -> None:
    """Without an engine in the trainer, every second step; a reader of the store serves `HEAD` faithfully."""
    model = tiny_lora(load_model(llama_dir), scale=0.05)
    with AdapterStore(shm_dir / "store", archive=tmp_path / "run") as store:
        fit(model, tmp_path, PublishAdapter(store, every=2))
        assert [version.step for version in store.list()] == [0, 2, 4, 5]
        with AdapterStore(shm_dir / "store", readonly=True) as reader:
            head = reader.head
            assert head is not None
            assert head.step == 5
            assert llama_engine.load(head).proof == "slots"
            served = llama_engine.logprobs(SEQUENCES, adapter=head)
            llama_engine.unload(head)
    assert mean_abs_difference(served, teacher_logprobs(model, SEQUENCES)) < 0.05


def test_rollback_from_another_callback(llama_dir: Path, shm_dir: Path, tmp_path: Path) -> None:
    """At step 4, to version 3 (published at step 2): weights and moments to the bit, and it becomes the parent."""
    model = tiny_lora(load_model(llama_dir), scale=0.05)
    with AdapterStore(shm_dir / "store", archive=tmp_path / "run") as store:
        publish = PublishAdapter(store)
        going = Going(publish, back_at=4, to=3)
        fit(model, tmp_path, publish, going)
        assert (going.report.weights, going.report.optimizer, going.report.scheduler) == (
            "exact",
            "restored",
            "restored",
        )
        assert all(torch.equal(going.after[4][name], tensor) for name, tensor in going.after[2].items())
        assert torch.equal(going.moments[4], going.moments[2])
        assert any(not torch.equal(going.after[3][name], tensor) for name, tensor in going.after[2].items())
        assert store.list()[-1].parent == 3
        assert store.list()[-1].step == 5


class Asking(TrainerCallback):
    """Another process asks for version 1 while step 2 is under way."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.asked = request(self.run, "rollback", to=1)


def test_the_command_line_is_answered_before_the_next_step(llama_dir: Path, shm_dir: Path, tmp_path: Path) -> None:
    model, run = tiny_lora(load_model(llama_dir), scale=0.05), tmp_path / "run"
    with AdapterStore(shm_dir / "store", archive=run) as store:
        asking = Asking(run)
        fit(model, tmp_path, PublishAdapter(store), asking)
        answer = asking.asked.answered()
        assert answer is not None
        assert (answer["left"], answer["version"]) == (3, 1)
        assert [(version.number, version.parent) for version in store.list()][2:4] == [(3, 2), (4, 1)]


def test_evaluations_are_kept_with_the_version_they_measured(llama_dir: Path, shm_dir: Path, tmp_path: Path) -> None:
    """So that the best can be gone back to by name; an evaluation between two publications measured no version."""
    model = tiny_lora(load_model(llama_dir), scale=0.05)
    with AdapterStore(shm_dir / "store", archive=tmp_path / "run") as store:
        publish = PublishAdapter(store, every=2)
        trainer = fit(model, tmp_path, publish, eval_strategy="steps", eval_steps=1)
        measured = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        recorded = {version.step: store.metrics(version.number).get("eval_loss") for version in store.list()}
        assert recorded == {0: None, 2: pytest.approx(measured[2]), 4: pytest.approx(measured[4]), 5: None}
        best = min((2, 4), key=lambda step: measured[step])
        assert publish.rollback("best:-eval_loss").version.step == best


def test_what_cannot_be_served_is_refused_before_a_step(llama_dir: Path, shm_dir: Path, tmp_path: Path) -> None:
    dora = get_peft_model(load_model(llama_dir), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with AdapterStore(shm_dir / "store", archive=tmp_path / "run") as store:
        with pytest.raises(UnsupportedAdapter, match="use_dora"):
            fit(dora, tmp_path, PublishAdapter(store))
        with pytest.raises(UnsupportedAdapter, match="no PEFT adapter"):
            fit(load_model(llama_dir), tmp_path, PublishAdapter(store))
        begin: Any = TrainingArguments(optim="galore_adamw", output_dir=str(tmp_path))
        with pytest.raises(ConfigError, match=r"optim='galore_adamw'.*adamw_torch"):
            PublishAdapter(store).on_train_begin(begin, None, None, model=None, optimizer=None, lr_scheduler=None)
        assert store.list() == []


def test_used_wrongly(shm_dir: Path) -> None:
    with AdapterStore(shm_dir / "store") as store:
        with pytest.raises(ConfigError, match="every=0"):
            PublishAdapter(store, every=0)
        with pytest.raises(ConfigError, match="dtype='bf16'"):
            PublishAdapter(store, dtype="bf16")
        publish = PublishAdapter(store)
        with pytest.raises(ConfigError, match="not begun"):
            publish.rollback("parent")
        with pytest.raises(ConfigError, match="elsewhere"):
            publish.engine.logprobs(SEQUENCES, adapter=None)
