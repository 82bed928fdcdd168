"""The trainer on a real engine and the demo's base: what it learns from, what it refuses, what it leaves behind."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from lora_grpo import EngineConfig, FakeEngine, GRPOConfig, GRPOTrainer, ModelConfig, Sampling
from lora_grpo.demo import MAX_TOKENS, demo_config, ensure_base, held_out_rows, training_rows
from lora_grpo.engines.base import Adapters
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, DeliveryError, RewardError, TrainingError
from lora_grpo.grpo.forward import teacher_logprobs
from lora_grpo.metrics.render import GAP
from lora_grpo.rewards import exact
from lora_grpo.types import Group, Prompt
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.vllm

CONFIG = GRPOConfig(
    seed=0,
    total_steps=3,
    num_generations=8,
    generation_batch_size=256,
    per_device_train_batch_size=128,
    gradient_accumulation_steps=1,
    max_completion_length=MAX_TOKENS,
    learning_rate=1e-3,
    adam_beta2=0.99,
)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ENGINE = EngineConfig(max_model_len=64, max_num_seqs=512, enforce_eager=True, gpu_memory_utilization=0.1)


@pytest.fixture(scope="module")
def base_dir() -> Path:
    return ensure_base()


@pytest.fixture(scope="module")
def engine(base_dir: Path) -> Iterator[VLLMEngine]:
    started = VLLMEngine(
        base_dir, max_lora_rank=16, **ENGINE.model_dump(include={"max_model_len", "max_num_seqs", "enforce_eager"})
    )
    yield started
    started.close()


@pytest.fixture
def trainer_of(base_dir: Path, engine: VLLMEngine, tmp_path: Path) -> Iterator[Any]:
    """Builds trainers on the shared engine, and closes them."""
    built: list[GRPOTrainer] = []

    def build(config: GRPOConfig = CONFIG, **settings: Any) -> GRPOTrainer:
        arguments: dict[str, Any] = {
            "reward_funcs": exact("answer"),
            "train_dataset": training_rows(512),
            "eval_dataset": held_out_rows(64),
            "peft_config": LoraConfig(**LORA),
            "engine": engine,
            "run_dir": tmp_path / f"run{len(built)}",
            "view": False,
            **settings,
        }
        rewards = arguments.pop("reward_funcs")
        built.append(GRPOTrainer(ModelConfig(name=str(base_dir), dtype="float32"), rewards, config, **arguments))
        return built[-1]

    yield build
    for trainer in built:
        trainer.close()


class CutEngine(VLLMEngine):
    """A real engine whose rollouts silently come from the base, as many frameworks' have; everything else is honest."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.__dict__ = engine.__dict__

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, adapter: Adapters) -> list[Group]:
        groups = super().generate(prompts, sampling, adapter=None)
        number = adapter.number if hasattr(adapter, "number") else None
        return [
            replace(group, completions=tuple(replace(c, version=number) for c in group.completions)) for group in groups
        ]


def stopping_after(steps: int) -> Any:
    """The demo's reward for so many steps, then Ctrl-C."""
    calls = itertools.count(1)

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        if next(calls) > steps:
            raise KeyboardInterrupt
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    return reward


def test_rollouts_from_the_base_stop_training_at_step_two(trainer_of: Any, engine: VLLMEngine, tmp_path: Path) -> None:
    """At step 1 the adapter equals the base and nothing can be seen; accuracy would rise even with the sync cut."""
    demo = demo_config(ensure_base(), tmp_path / "demo", steps=30, seed=0).grpo
    settings = {"train_dataset": training_rows(), "eval_dataset": None}
    real = trainer_of(demo, reward_funcs=stopping_after(2), **settings)
    with pytest.raises(KeyboardInterrupt):
        real.train()
    real_gap = real.history[1][GAP]
    cut = trainer_of(demo, engine=CutEngine(engine), **settings)
    with pytest.raises(DeliveryError, match="were not made by v2") as caught:
        cut.train()
    cut_gap = float(re.search(r"differ by ([0-9.]+) nats", str(caught.value)).group(1))
    print(f"log-prob gap at step 2: {real_gap:.5f} nats, with the sync cut {cut_gap:.4f}")
    assert cut_gap >= 20 * real_gap
    assert cut.steps_done == 1
    assert cut.store.head is not None
    assert cut.store.head.number == 2


def test_a_run_leaves_its_record(trainer_of: Any) -> None:
    trainer = trainer_of(CONFIG.replace(canary_every=1, log_completions_every=2))
    result = trainer.train()
    run = trainer.run_dir
    assert result["steps"] == 3
    assert result["versions"] == 4
    assert result["reward_after"] == trainer.evaluations[-1].metrics["reward"]
    assert [metrics["version"] for metrics in trainer.history] == [1, 2, 3]
    assert trainer.history[0]["canary/verdict"] == "inconclusive"
    assert trainer.history[2]["canary/verdict"] == "ok"
    assert trainer.store.metrics(2)["reward"] == pytest.approx(trainer.history[1]["reward"])
    assert "reward" not in trainer.store.metrics(4)
    rows = json.loads((run / "evaluations" / "000004.json").read_text())["rows"]
    assert len(rows) == 64
    assert {row["version"] for row in rows} == {4}
    assert len({row["prompt"] for row in rows}) == 64
    assert sum(row["reward"] for row in rows) / 64 == pytest.approx(result["reward_after"])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert (run / "plot.png").stat().st_size > 10_000


def test_the_saved_folder_is_the_trained_policy(trainer_of: Any, base_dir: Path, tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.train()
    assert trainer.save_model(tmp_path / "last").number == 4
    best = trainer.save_model(tmp_path / "best", which="best")
    assert trainer.store.metrics(best.number)["eval/reward"] == max(e.metrics["reward"] for e in trainer.evaluations)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    saved = PeftModel.from_pretrained(base, tmp_path / "last")
    assert saved.peft_config["default"].lora_alpha == 32
    sequences = torch.randint(2, 14, (4, 10)).tolist()
    for ours, theirs in zip(
        teacher_logprobs(trainer.model, sequences), teacher_logprobs(saved, sequences), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=0.02)


def test_a_rollout_function_may_take_turns_but_not_change_the_policy(trainer_of: Any) -> None:
    """Tokens that the policy did not sample move nothing, whatever their log-prob."""

    def with_tool_output(value: float) -> Any:
        def rollout(prompts: Sequence[Prompt], engine: Any, version: Any) -> list[Group]:
            sampling = Sampling(n=8, max_tokens=MAX_TOKENS, seed=5)
            groups = engine.generate(prompts, sampling, adapter=version)
            return [
                replace(group, completions=tuple(append_tool(c, value) for c in group.completions)) for group in groups
            ]

        return rollout

    def append_tool(completion: Any, value: float) -> Any:
        return replace(
            completion,
            token_ids=(*completion.token_ids, 5, 6),
            logprobs=(*completion.logprobs, value, value),
            token_mask=(*(True for _ in completion.token_ids), False, False),
        )

    weights = []
    for value in (-0.1, -9.0):
        trainer = trainer_of(CONFIG.replace(total_steps=1), rollout_func=with_tool_output(value))
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.policy.parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

    def from_the_base(prompts: Sequence[Prompt], engine: Any, version: Any) -> list[Group]:
        return engine.generate(prompts, Sampling(n=8, max_tokens=4), adapter=None)

    with pytest.raises(DeliveryError, match="pass adapter=version"):
        trainer_of(rollout_func=from_the_base).train()
    with pytest.raises(ConfigError, match="num_generations=8"):
        trainer_of(rollout_func=lambda prompts, engine, version: []).train()


def test_rewards_get_their_columns_and_name_the_prompt(trainer_of: Any) -> None:
    seen: list[int] = []

    def short(completions: list[str], carry: list[bool], **columns: Any) -> list[float]:
        seen.append(len(carry))
        return [float(len(text) == 3) for text in completions]

    def broken(prompts: list[str], **columns: Any) -> list[float]:
        raise KeyError("tariff")

    trainer = trainer_of(
        CONFIG.replace(total_steps=1, reward_weights=(1.0, 0.5)), reward_funcs=[exact("answer"), short]
    )
    trainer.train()
    metrics = trainer.history[0]
    assert seen[1] == 256
    assert metrics["reward"] == pytest.approx(metrics["rewards/exact/mean"] + 0.5 * metrics["rewards/short/mean"])
    with pytest.raises(RewardError, match=r"'broken' raised KeyError: 'tariff' .*prompt"):
        trainer_of(reward_funcs=broken, eval_dataset=None).train()
    with pytest.raises(ConfigError, match="column 'fare'"):
        trainer_of(reward_funcs=lambda completions, fare, **columns: [])


def test_ctrl_c_leaves_the_last_version_serving(trainer_of: Any, engine: VLLMEngine) -> None:
    trainer = trainer_of(reward_funcs=stopping_after(2), eval_dataset=None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.steps_done == 2
    assert trainer.version.number == 3
    trainer.store.verify(3)
    group = engine.generate(["12+34="], Sampling(max_tokens=4), adapter=trainer.version)[0]
    assert group.completions[0].version == 3


def test_weights_that_are_not_finite_never_leave_the_trainer(trainer_of: Any) -> None:
    trainer = trainer_of()
    trainer.train()
    head = trainer.version
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "layers.1" in n and "lora_B" in n)[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"layers\.1.*lora_B.weight holds non-finite"):
        trainer.sync.push(step=9)
    assert trainer.version == head
    assert [version.number for version in trainer.store.list()] == [1, 2, 3, 4]


def test_a_directory_with_a_run_is_not_written_over(trainer_of: Any, tmp_path: Path) -> None:
    first = trainer_of(CONFIG.replace(total_steps=1))
    first.train()
    first.close()
    with pytest.raises(ConfigError, match="resume it, or choose another run_dir"):
        trainer_of(run_dir=first.run_dir).train()


def test_a_loop_can_be_tried_on_a_fake_engine(base_dir: Path, tmp_path: Path) -> None:
    def reply(prompt: Prompt, version: Any, seed: int) -> str:
        return "081" if seed % 2 else "000"

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    config = CONFIG.replace(vllm_importance_sampling_correction=False, total_steps=2)
    with GRPOTrainer(
        ModelConfig(name=str(base_dir), dtype="float32"),
        exact("answer"),
        config,
        [{"prompt": "65+16=", "answer": "081"}] * 32,
        peft_config=LoraConfig(**LORA),
        engine=FakeEngine(reply, tokenizer=tokenizer),
        run_dir=tmp_path / "run",
        view=False,
    ) as trainer:
        trainer.train()
        assert trainer.sync.probe is None
        assert 0.3 < trainer.history[0]["reward"] < 0.7
        assert trainer.version.number == 3


def test_another_vocabulary_is_refused(trainer_of: Any) -> None:
    with pytest.raises(ConfigError, match=r"in processing_class and .* in the engine's tokenizer"):
        trainer_of(processing_class=tiny_tokenizer())


def test_what_is_missing_is_said_before_anything_starts(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_dataset is missing"):
        GRPOTrainer(str(base_dir), exact("answer"), CONFIG, run_dir=tmp_path / "a", view=False)
    with pytest.raises(ConfigError, match="pass peft_config"):
        GRPOTrainer(str(base_dir), exact("answer"), CONFIG, training_rows(8), run_dir=tmp_path / "b", view=False)
