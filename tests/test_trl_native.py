"""Our path inside TRL's own trainer, on a real vLLM: what is sampled from, what is never touched, what comes back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

import pandas as pd  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from lora_grpo.adapters.asking.requests import Request, request  # noqa: E402
from lora_grpo.adapters.files.disk import digest_buffers  # noqa: E402
from lora_grpo.adapters.peft_form.serving import ServingForm  # noqa: E402
from lora_grpo.adapters.store import AdapterStore  # noqa: E402
from lora_grpo.adapters.version import AdapterVersion  # noqa: E402
from lora_grpo.engines import compat  # noqa: E402
from lora_grpo.errors import (  # noqa: E402
    ConfigError,
    DeliveryError,
    LoraGrpoError,
    StoreLocked,
    UnsupportedAdapter,
    UnsupportedVersion,
)
from lora_grpo.grpo_config import GRPOConfig as OwnConfig  # noqa: E402
from lora_grpo.integrations.callback import CANARY_EVERY, NativeRollouts  # noqa: E402
from lora_grpo.integrations.trl import NativeGRPOTrainer, check_release  # noqa: E402
from lora_grpo.metrics.log import read_metrics  # noqa: E402
from lora_grpo.rollback import RollbackReport  # noqa: E402
from tests.tiny_models import load_model, tiny_lora, tiny_tokenizer  # noqa: E402
from tests.tiny_policy import base_model, cut_below, peft_model  # noqa: E402

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

ROLLED_BACK_AT, STEPS = 5, 8
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def even(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Some completions earn something, some nothing, and one has no reward at all."""
    rewards: list[float | None] = [float(sum(ids) % 2) for ids in completion_ids]
    rewards[0] = None
    return rewards


def arguments(folder: Path, **changes: Any) -> Any:
    plain: dict[str, Any] = {
        "output_dir": str(folder),
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 128,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "generation_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "beta": 0.02,
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "log_completions": True,
        "num_completions_to_print": 1,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "per_device_eval_batch_size": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return trl.GRPOConfig(**{**plain, **changes})


def native_trainer(model: Any, args: Any, **others: Any) -> NativeGRPOTrainer:
    train, held_out = (
        Dataset.from_dict({"prompt": rows}) for rows in (["ab", "hello", "x y", "12+34="] * 4, ["a", "b"])
    )
    return NativeGRPOTrainer(
        model=model, reward_funcs=even, args=args, train_dataset=train, eval_dataset=held_out, **others
    )


@dataclass
class Seen:
    """A training, as its callbacks saw it. `sampled`: step, version, whether the trainer then held its weights."""

    trainer: Any
    base_before: str
    sampled: list[tuple[int, int, bool]] = field(default_factory=list)
    head_before: int = 0
    report: RollbackReport | None = None
    weights_then: dict[str, torch.Tensor] = field(default_factory=dict)
    weights_after_rollback: dict[str, torch.Tensor] = field(default_factory=dict)


class BackAtStep(TrainerCallback):
    """What a user writes: go back when something is wrong."""

    def __init__(self) -> None:
        self.seen: Seen | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen = self.seen
        assert seen is not None
        if state.global_step == ROLLED_BACK_AT:
            seen.head_before = seen.trainer.native.store.head.number
            seen.report = seen.trainer.rollback(to=2)
            seen.weights_after_rollback = adapter_weights(seen.trainer.model)


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def base_digest(trainer: Any) -> str:
    """Of every byte of the base, in the trainer and in the engine."""
    found = hashlib.sha256()
    engine = trainer.native.engine
    for name, parameter in [*trainer.model.named_parameters(), *compat.base_parameters(engine._llm)]:
        if "lora_" not in name:
            found.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def holds(trainer: Any, version: Any) -> bool:
    form = ServingForm(trainer.model, "default", getattr(torch, trainer.native.engine.lora_dtype))
    return digest_buffers(form.files()) == version.digest


def watch(seen: Seen) -> None:
    """Note what each call samples from, and which weights the trainer has then."""
    engine, trainer = seen.trainer.native.engine, seen.trainer
    generate = engine.generate

    def noting(prompts: Any, sampling: Any, *, adapter: Any) -> Any:
        groups = generate(prompts, sampling, adapter=adapter)
        made_by = {completion.version for group in groups for completion in group.completions}
        assert made_by == {adapter.number}
        if trainer.state.global_step == 2:
            seen.weights_then = adapter_weights(trainer.model)
        seen.sampled.append((trainer.state.global_step, adapter.number, holds(trainer, adapter)))
        return groups

    engine.generate = noting


@pytest.fixture(scope="module")
def seen(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Eight optimizer steps, two a generation, with a rollback in the middle of one; merging raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something merged the adapter")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseTuner, "merge_adapter", refuse)
        patch.setattr(BaseTuner, "unmerge_adapter", refuse)
        patch.setattr(LoraLinear, "merge", refuse)
        back = BackAtStep()
        trainer = native_trainer(
            str(llama_dir),
            arguments(tmp_path_factory.mktemp("trl")),
            peft_config=LoraConfig(**LORA),
            callbacks=[back],
        )
        back.seen = result = Seen(trainer, base_digest(trainer))
        watch(result)
        trainer.train()
        del trainer.native.engine.generate
        yield result
        trainer.close()


def test_every_rollout_is_made_by_the_version_that_holds_the_weights(seen: Seen) -> None:
    """One version a generation; after the rollback at step 5, mid-generation, the next is made by version 2 itself.

    The evaluations after steps 4 and 8 use the version of their weights: the first is the next generation's too.
    """
    assert [(step, number) for step, number, _ in seen.sampled] == [
        (0, 1),
        (2, 2),
        (4, 3),
        (4, 3),
        (5, 2),
        (6, 4),
        (8, 5),
    ]
    assert all(held for _, _, held in seen.sampled)


def test_the_base_never_changes(seen: Seen) -> None:
    """Merging and unmerging would leave rounding behind, even where it ends with the adapter apart again."""
    assert base_digest(seen.trainer) == seen.base_before


def test_rollback_from_a_callback(seen: Seen) -> None:
    """Weights come back to the bit and the next version has the one gone back to as its parent."""
    assert seen.head_before == 3
    assert seen.report is not None
    assert (seen.report.version.number, seen.report.weights, seen.report.optimizer) == (2, "exact", "restored")
    assert seen.weights_then.keys() == seen.weights_after_rollback.keys()
    assert all(torch.equal(seen.weights_then[name], seen.weights_after_rollback[name]) for name in seen.weights_then)
    assert seen.trainer.native.store.get(4).parent == 2


def test_importance_sampling_correction_finds_nothing_to_correct(seen: Seen) -> None:
    """TRL's own ratio of trainer to sampler; a merged or stale policy moves it at this learning rate."""
    ratios = [
        entry["sampling/importance_sampling_ratio/mean"]
        for entry in seen.trainer.state.log_history
        if "sampling/importance_sampling_ratio/mean" in entry
    ]
    assert len(ratios) == 5
    assert all(ratio == pytest.approx(1.0, abs=0.05) for ratio in ratios)


def test_provenance(seen: Seen) -> None:
    """TRL's logs and completion tables say which version made what, and the store what each version earned."""
    logged = [entry for entry in seen.trainer.state.log_history if "version" in entry]
    assert [int(entry["version"]) for entry in logged] == [1, 2, 3, 2, 4]
    assert ["sync/prove_s" in entry for entry in logged] == [True, True, True, False, True], "v2 was not pushed again"
    by_step = dict(zip((1, 3, 5, 6, 7), logged, strict=True))
    store = seen.trainer.native.store
    for step, number in ((1, 1), (5, 3), (7, 4)):
        assert store.metrics(number)["reward"] == pytest.approx(by_step[step]["reward"])
        assert store.metrics(number)["rewards/even/mean"] == pytest.approx(by_step[step]["rewards/even/mean"])
    assert store.metrics(2)["reward"] == pytest.approx((by_step[3]["reward"] + by_step[6]["reward"]) / 2)
    evaluated = [entry["eval_reward"] for entry in seen.trainer.state.log_history if "eval_reward" in entry]
    assert [store.metrics(number)["eval/reward"] for number in (3, 5)] == pytest.approx(evaluated)
    table = pd.read_parquet(Path(seen.trainer.args.output_dir) / "completions" / "completions_00007.parquet")
    assert set(table["version"]) == {4}


def test_versions_survive_in_the_run_directory(seen: Seen) -> None:
    store = seen.trainer.native.store
    assert store.archive == Path(seen.trainer.args.output_dir) / "native"
    assert [version.step for version in store.list()] == [0, 2, 4, 6, 8]
    for version in store.list():
        store.verify(version.number)
        assert store.where(version.number) >= {"archive", "state"}


def test_backend_answers_in_trl_form(seen: Seen) -> None:
    """A row near the model's limit gets the tokens that are left, as in stock TRL; the others get all of theirs."""
    trainer = seen.trainer
    prompts = [[70, 71], [80] * 126, [90, 91, 92]]
    backend = trainer.vllm_generation
    prompt_ids, completion_ids, logprobs, tokens = backend.generate(prompts, None, 1)
    assert prompt_ids == prompts
    assert len(completion_ids[1]) <= 2 < len(completion_ids[0])
    for ids, rows, named in zip(completion_ids, logprobs, tokens, strict=True):
        assert named == [[token] for token in ids]
        assert all(row[0] is not None and math.isfinite(row[0]) and row[0] <= 0 for row in rows)
    assert backend.llm.llm_engine.model_config.max_model_len == 128
    with pytest.raises(ConfigError, match="images"):
        backend.generate([[70]], [["picture"]], 1)


def test_the_canary_catches_weights_that_were_not_published(seen: Seen) -> None:
    trainer = seen.trainer
    trainer.publish()
    kept = adapter_weights(trainer.model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in kept:
                parameter.add_(torch.randn_like(parameter))

    def until_due() -> None:
        for _ in range(CANARY_EVERY):
            trainer.native.generate([[70, 71], [80, 81]], STEPS)

    with pytest.raises(DeliveryError):
        until_due()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])


def publish_moved(trainer: Any) -> AdapterVersion:
    """A version of weights that no optimizer step has made."""
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).add_(0.5)
    version: AdapterVersion = trainer.publish()
    return version


def test_publishing_twice_makes_one_version(seen: Seen) -> None:
    """Also when the weights moved without an optimizer step, the version published is theirs."""
    trainer = seen.trainer
    first = trainer.publish()
    assert trainer.publish() == first
    moved = publish_moved(trainer)
    assert moved.number == first.number + 1
    assert holds(trainer, moved)


def test_checkpoints_and_resuming(seen: Seen, llama_dir: Path) -> None:
    """TRL's checkpoint holds the adapter; a trainer resumed from it goes on from the version of those weights."""
    folder = Path(seen.trainer.args.output_dir)
    saved = load_file(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    later = publish_moved(seen.trainer).number
    assert later > 5, "the checkpoint's version"
    seen.trainer.close()
    args = arguments(folder, max_steps=STEPS + 2)
    trainer = native_trainer(str(llama_dir), args, peft_config=LoraConfig(**LORA))
    resumed = Seen(trainer, base_digest(trainer))
    started: list[dict[str, torch.Tensor]] = []
    generate = trainer.native.generate

    def noting(*call: Any, **how: Any) -> Any:
        started.append(adapter_weights(trainer.model))
        return generate(*call, **how)

    trainer.native.generate = noting  # type: ignore[method-assign]
    try:
        watch(resumed)
        trainer.train(resume_from_checkpoint=True)
        assert resumed.sampled == [(STEPS, 5, True), (STEPS + 2, later + 1, True)]
        head = trainer.native.store.head
        assert (head.number, head.parent, holds(trainer, head)) == (later + 1, 5, True)
        weights = {name.replace(".default", ""): tensor for name, tensor in started[0].items()}
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], weights[name].cpu()) for name in saved)
    finally:
        trainer.close()


def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(llama_dir: Path, tmp_path: Path) -> None:
    """To the bit, though the evaluation before the checkpoint was not made again."""

    def trained(folder: Path, checkpoint: str | None) -> dict[str, torch.Tensor]:
        trainer = native_trainer(str(llama_dir), arguments(folder, max_steps=6), peft_config=LoraConfig(**LORA))
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            return adapter_weights(trainer.model)
        finally:
            trainer.close()

    whole = trained(tmp_path / "whole", None)
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    (tmp_path / "whole" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.warns(RuntimeWarning, match="checkpoint-4 has no optimizer.pt: .* start anew.*save_only_model=False"):
        trained(tmp_path / "anew", str(tmp_path / "whole" / "checkpoint-4"))


def test_a_rollout_function_on_trls_own_defaults(llama_dir: Path, tmp_path: Path) -> None:
    """bf16 autocast, gradient checkpointing, TRL's dtype; the user's function samples through the stand-in."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.processing_class(prompts)["input_ids"]
        prompt_ids, completion_ids, logprobs, _ = trainer.vllm_generation.generate(ids, None, trainer.num_generations)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [[row[0] for row in rows] for rows in logprobs],
        }

    args = arguments(tmp_path, max_steps=4, bf16=True, gradient_checkpointing=True, model_init_kwargs=None, beta=0.0)
    adapted = LoraConfig(**{**LORA, "target_modules": ["q_proj", "down_proj"]})
    trainer = native_trainer(str(llama_dir), args, peft_config=adapted, rollout_func=rollout)
    try:
        wrapped = compat.wrapped_modules(trainer.native.engine._llm)
        assert {name.rsplit(".", 1)[-1] for name in wrapped} == {"qkv_proj", "down_proj"}
        result = Seen(trainer, base_digest(trainer))
        watch(result)
        trainer.train()
        assert [(step, number) for step, number, _ in result.sampled] == [(0, 1), (2, 2), (4, 3)]
        assert all(held for _, _, held in result.sampled)
        assert base_digest(trainer) == result.base_before
    finally:
        trainer.close()


def test_completions_end_where_trl_takes_them_to_end(llama_dir: Path, tmp_path: Path) -> None:
    """At the end tokens of the model that it was given, not only at those in the checkpoint's files; and a text that
    begins with the begin token has one."""
    model, own = load_model(llama_dir), tiny_tokenizer()
    own.bos_token = "<|im_start|>"
    own._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", own.bos_token_id)]
    )
    ends = set(range(4, 134))
    model.generation_config.eos_token_id = sorted(ends)
    seen: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    trainer = NativeGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments(tmp_path, max_steps=1, eval_strategy="no", save_strategy="no"),
        train_dataset=Dataset.from_dict({"prompt": ["<|im_start|>a"] * 8}),
        processing_class=own,
        peft_config=LoraConfig(**LORA),
    )
    try:
        assert trainer._tokenize_prompts(["<|im_start|>a"])[0] == [own.encode("a")]
        trainer.train()
    finally:
        trainer.close()
    assert len(seen) == 16
    for ids in seen:
        assert not ends & set(ids[:-1])
        assert ids[-1] in ends or len(ids) == 8


def test_a_trained_adapter_is_its_own_reference(llama_dir: Path, tmp_path: Path) -> None:
    """Loaded by `PeftModel.from_pretrained`: the KL is 0 at the first step, not what training had moved it from the
    base; and what is sampled is the trained adapter."""
    tiny_lora(load_model(llama_dir), r=8, scale=0.3).save_pretrained(tmp_path / "trained")
    model = PeftModel.from_pretrained(load_model(llama_dir), tmp_path / "trained", is_trainable=True)
    loaded = adapter_weights(model)
    args = arguments(tmp_path / "out", max_steps=2, generation_batch_size=8, beta=0.1, eval_strategy="no")
    trainer = native_trainer(model, args, processing_class=tiny_tokenizer())
    try:
        result = Seen(trainer, base_digest(trainer))
        watch(result)
        trainer.train()
        assert [(step, held) for step, _, held in result.sampled] == [(0, True), (1, True)]
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[1] > 1e-4
        reference = dict(trainer.model.named_parameters())
        assert all(torch.equal(reference[name.replace(".default.", ".ref.")], loaded[name]) for name in loaded)
        assert base_digest(trainer) == result.base_before
    finally:
        trainer.close()


class Asking(TrainerCallback):
    """Another process that asks for an earlier version in the middle of a generation."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.asked: list[Request] = []
        self.answers: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        run = self.trainer.native.store.archive
        self.answers += [each.answered() for each in self.asked]
        self.asked = []
        if state.global_step == 3:
            self.asked = [request(run, "rollback", to="parent"), request(run, "pin", version=1)]


def test_the_command_line_is_answered_before_the_next_step(llama_dir: Path, tmp_path: Path) -> None:
    """And what was sampled from the version that was left is thrown away: v1 samples what its step is trained on."""
    asking = Asking()
    args = arguments(tmp_path, max_steps=6, eval_strategy="no")
    trainer = native_trainer(str(llama_dir), args, peft_config=LoraConfig(**LORA), callbacks=[asking])
    asking.trainer = trainer
    try:
        result = Seen(trainer, base_digest(trainer))
        watch(result)
        trainer.train()
        back, pinned = asking.answers
        assert (back["left"], back["version"], back["weights"]) == (2, 1, "exact")
        assert "optimizer restored, scheduler restored" in back["done"]
        assert pinned["pins"] == [1]
        assert result.sampled == [(0, 1, True), (2, 2, True), (3, 1, True), (4, 3, True)]
        assert trainer.native.store.get(3).parent == 1
        head = trainer.native.store.head
        assert (head.number, head.parent, holds(trainer, head)) == (4, 3, True), "what was trained last is a version"
        told = [record["event"] for record in read_metrics(trainer.native.store.archive)]
        assert told == ["rollback", "message"]
    finally:
        trainer.close()


def test_a_directory_that_holds_a_run_is_not_trained_over(seen: Seen, llama_dir: Path) -> None:
    """Else versions of two runs would be each other's parents."""
    seen.trainer.close()
    trainer = native_trainer(
        str(llama_dir), arguments(Path(seen.trainer.args.output_dir)), peft_config=LoraConfig(**LORA)
    )
    try:
        with pytest.raises(ConfigError, match="holds a run at v"):
            trainer.train()
    finally:
        trainer.close()


REFUSED_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no vLLM": ({"use_vllm": False}, "use_vllm=True"),
    "server": ({"vllm_mode": "server"}, "colocate"),
    "tensor parallel": ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2"),
    "sleep": ({"vllm_enable_sleep_mode": True}, "level 2"),
    "other model code": ({"vllm_model_impl": "transformers"}, "vllm_model_impl"),
    "structured outputs": ({"vllm_structured_outputs_regex": "[0-9]+"}, "reward function"),
    "continuous batching": ({"use_transformers_continuous_batching": True}, "come from vLLM"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel=True: its kernels replace layers when training begins"),
    "noise in the trainer alone": (
        {"neftune_noise_alpha": 5.0},
        "neftune_noise_alpha=5.0: its noise is in the trainer's",
    ),
    "a moving reference": ({"sync_ref_model": True}, "sync_ref_model=True: with an adapter"),
    "an optimizer of objects": ({"optim": "galore_adamw"}, "optim='galore_adamw': its state cannot be kept"),
    "an optimizer of packed tensors": ({"optim": "adamw_torch_8bit"}, "use 'adamw_torch' or 'adamw_8bit'"),
    "float16": ({"fp16": True}, "fp16=True: float16 needs a loss scale, which no rollback restores"),
    "repetition penalty": ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
    "greedy": ({"temperature": 0.0}, "temperature=0.0: the completions of a group would all be the same"),
    "unknown sampling": ({"generation_kwargs": {"logit_bias": {3: 1.0}}}, "logit_bias"),
    "a stop that is none": (
        {"generation_kwargs": {"stop": 3}},
        r"generation_kwargs=\{'stop': 3\}: Sampling.stop=3 must be",
    ),
    "stop ids": ({"generation_kwargs": {"stop_token_ids": ["a"]}}, r"Sampling.stop_token_ids=\['a'\] must be a tuple"),
    "tokens": ({"generation_kwargs": {"max_tokens": "8"}}, "Sampling.max_tokens='8' must be a whole number"),
    "no dict of sampling": ({"generation_kwargs": ["stop"]}, r"generation_kwargs=\['stop'\]: only max_tokens"),
    "a temperature in words": ({"temperature": "hot"}, "Sampling.temperature='hot' must be a number"),
    "tensor parallel in words": ({"vllm_tensor_parallel_size": "2"}, "vllm_tensor_parallel_size='2'"),
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_refused_arguments(name: str, llama_dir: Path, tmp_path: Path) -> None:
    changes, message = REFUSED_ARGUMENTS[name]
    with pytest.raises(ConfigError, match=message):
        native_trainer(str(llama_dir), arguments(tmp_path, **changes), peft_config=LoraConfig(**LORA))


class TwoProcesses(trl.GRPOConfig):  # type: ignore[misc]
    """What torchrun with two processes makes of the arguments."""

    world_size = 2


def test_several_processes_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    args = TwoProcesses(str(tmp_path), use_vllm=True, vllm_mode="colocate", report_to="none", bf16=False)
    with pytest.raises(ConfigError, match="world_size=2"):
        native_trainer(str(llama_dir), args, peft_config=LoraConfig(**LORA))


REFUSED_ADAPTERS: dict[str, tuple[Any, str]] = {
    "none": (None, "full fine-tuning"),
    "a typo": (LoraConfig(r=8, target_modules=["q_proj", "vproj"]), "has no layer 'vproj'; did you mean 'v_proj'"),
    "dora": (LoraConfig(**LORA, use_dora=True), "use_dora"),
    "modules_to_save": (LoraConfig(**LORA, modules_to_save=["embed_tokens"]), "modules_to_save"),
    "target_parameters": (
        LoraConfig(r=8, target_modules=["q_proj"], target_parameters=["self_attn.v_proj.weight"]),
        "target_parameters",
    ),
    "prompt learning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PromptTuningConfig"),
}


@pytest.mark.parametrize("name", REFUSED_ADAPTERS)
def test_refused_adapters(name: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an engine is started."""
    peft_config, message = REFUSED_ADAPTERS[name]
    monkeypatch.setattr("lora_grpo.integrations.trl.VLLMEngine", None)
    with pytest.raises((ConfigError, UnsupportedAdapter), match=message) as caught:
        native_trainer(str(llama_dir), arguments(tmp_path), peft_config=peft_config)
    assert isinstance(caught.value, LoraGrpoError)


def test_arguments_of_the_wrong_type(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before TRL loads the base."""
    monkeypatch.setattr("trl.GRPOTrainer.__init__", None)
    adapter, args = LoraConfig(**LORA), arguments(tmp_path)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "keep": ({"keep": "all"}, r"keep='all' must be a KeepConfig, such as KeepConfig\(on_tmpfs=8\)"),
        "engine_args": ({"engine_args": [1]}, r"engine_args=\[1\] must be a dict of VLLMEngine's keywords"),
        "its keys": ({"engine_args": {3: 1}}, "engine_args={3: 1} must be a dict"),
        "run_dir": ({"run_dir": 3}, "run_dir=3 must be a directory"),
        "store_root": ({"store_root": ["a"]}, r"store_root=\['a'\] must be a directory"),
        "peft_config": ({"peft_config": {"r": 8}}, "peft_config is a dict"),
    }
    for given, message in wrong.values():
        with pytest.raises((ConfigError, UnsupportedAdapter), match=message):
            native_trainer(str(llama_dir), args, **{"peft_config": adapter, **given})
    with pytest.raises(ConfigError, match="model=3 must be a name, a directory or a model"):
        native_trainer(3, args, peft_config=adapter)
    for rewards in (3, [even, None], (even,)):
        with pytest.raises(ConfigError, match=r"reward_funcs=.* must be a function, a reward model, its name"):
            NativeGRPOTrainer(str(llama_dir), rewards, args, peft_config=adapter)
    for rows in ([{"prompt": "a"}], "rows.jsonl"):
        with pytest.raises(ConfigError, match=r"train_dataset=.*Dataset.from_list\(rows\)"):
            NativeGRPOTrainer(str(llama_dir), even, args, rows, peft_config=adapter)
    with pytest.raises(ConfigError, match=r"args=\{'use_vllm': True\} must be a trl.GRPOConfig"):
        native_trainer(str(llama_dir), {"use_vllm": True}, peft_config=adapter)
    model = load_model(llama_dir)
    with pytest.raises(ConfigError, match="has no layer 'vproj'; did you mean 'v_proj'"):
        native_trainer(model, args, peft_config=LoraConfig(r=8, target_modules=["q_proj", "vproj"]))


def test_refused_places_and_settings(
    llama_dir: Path, tmp_path: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an engine is started; and what stops it leaves nothing of the run."""
    monkeypatch.setattr("lora_grpo.integrations.trl.VLLMEngine", None)
    adapter = LoraConfig(**LORA)
    with pytest.raises(ConfigError, match=r"lora_grpo's GRPOConfig.*pass a trl\.GRPOConfig"):
        native_trainer(str(llama_dir), OwnConfig(), peft_config=adapter)
    with pytest.raises(
        ConfigError, match=r"max_num_seqs follows from trl\.GRPOConfig's per_device_train_batch_size \*"
    ):
        native_trainer(str(llama_dir), arguments(tmp_path), peft_config=adapter, engine_args={"max_num_seqs": 8})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; choose another directory"):
        native_trainer(str(llama_dir), arguments(tmp_path), peft_config=adapter, run_dir=tmp_path / "file")
    with (
        AdapterStore(archive=tmp_path / "live"),
        pytest.raises(StoreLocked, match="live is open for writing in process"),
    ):
        native_trainer(str(llama_dir), arguments(tmp_path), peft_config=adapter, run_dir=tmp_path / "live")

    def stopped(*_: Any, **__: Any) -> None:
        assert (tmp_path / "run" / "store.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_grpo.integrations.trl.VLLMEngine", stopped)
    places = {"run_dir": tmp_path / "run", "store_root": shm_dir / "root"}
    with pytest.raises(KeyboardInterrupt):
        native_trainer(str(llama_dir), arguments(tmp_path), peft_config=adapter, **places)
    assert not any(place.exists() for place in places.values())


def test_an_adapter_is_no_base(llama_dir: Path, tmp_path: Path) -> None:
    tiny_lora(load_model(llama_dir)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is an adapter, not a base model"):
        native_trainer(str(tmp_path / "adapter"), arguments(tmp_path / "out"), peft_config=LoraConfig(**LORA))


def test_several_adapters_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(llama_dir), LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedAdapter, match="only one is published"):
        native_trainer(model, arguments(tmp_path, beta=0.0))


def test_a_model_without_a_checkpoint_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(llama_dir), LoraConfig(**LORA))
    model.base_model.model.config._name_or_path = model.base_model.model.name_or_path = ""
    with pytest.raises(ConfigError, match="checkpoint"):
        native_trainer(model, arguments(tmp_path, beta=0.0), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("release", ["1.15.2", "1.17.0", "2.0.0", None])
def test_other_releases_of_trl_are_refused(release: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UnsupportedVersion, match=rf"trl>=1\.16,<1\.17 .*{release or 'trl'}.*install lora-grpo"):
        check_release()


def test_without_trl_the_rest_works() -> None:
    """Only our TRL room needs it, and says so."""
    code = """
import importlib.metadata, sys
stock = importlib.metadata.version
def version(name):
    if name == "trl":
        raise importlib.metadata.PackageNotFoundError(name)
    return stock(name)
importlib.metadata.version = version
sys.modules["trl"] = None
import lora_grpo, lora_grpo.integrations.callback
lora_grpo.GRPOTrainer, lora_grpo.VLLMEngine
from lora_grpo.errors import UnsupportedVersion
try:
    import lora_grpo.integrations.trl
except UnsupportedVersion as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "install lora-grpo[trl]" in done.stdout


def test_stock_trl_is_left_as_it_was(seen: Seen) -> None:
    """The stand-in is there only while our trainer is built."""
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer import grpo_trainer

    assert grpo_trainer.VLLMGeneration is VLLMGeneration


def test_a_gradient_that_is_cut_is_told_before_the_optimizer_steps() -> None:
    """What our own trainer tells: of the layers below the cut, none would ever be trained."""
    model = peft_model(new=True)
    sync: Any = SimpleNamespace(adapter="default", store=SimpleNamespace(head=None))
    steps, state = NativeRollouts(Any, sync, Any, 1), SimpleNamespace(global_step=0)
    steps.on_train_begin(None, state, None, model=model)
    ids = torch.arange(2, 12)[None]

    def gradients(scale: float) -> None:
        model.zero_grad()
        (model(input_ids=ids, labels=ids).loss * scale).backward()

    gradients(0.0)
    steps.on_pre_optimizer_step(None, state, None)
    gradients(1.0)
    steps.on_pre_optimizer_step(None, state, None)
    cut_below(model)
    steps.on_train_begin(None, state, None, model=model)
    gradients(1.0)
    with pytest.raises(UnsupportedAdapter, match="no gradient reaches B of 7 of 14 adapted layers"):
        steps.on_pre_optimizer_step(None, state, None)


def version(number: int, parent: int | None, step: int) -> AdapterVersion:
    return AdapterVersion(number, parent, Path(f"/v/{number}"), "", step, 0.0)


@pytest.mark.parametrize(
    ("parents", "head", "told"),
    [
        ({3: 2}, 3, None),
        ({3: 2, 4: 3, 5: 4}, 5, None),
        ({3: 2}, 2, "v2 .* rollback after this checkpoint; .* of v3.*to=2"),
        ({3: 2, 4: 1, 5: 4}, 5, "v5 .* rollback after this checkpoint; .* of v3.*to=1"),
        ({3: 2, 5: 4}, 5, None),
    ],
)
def test_a_rollback_that_a_resume_undoes_is_told(
    parents: dict[int, int], head: int, told: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    """The checkpoint, of version 3, is older than the rollback; where pruning hides the way back, nothing is said."""
    versions = [version(1, None, 0), version(2, 1, 2), *(version(n, parent, n + 1) for n, parent in parents.items())]
    found = next(made for made in versions if made.number == head)
    store = SimpleNamespace(head=found, list=lambda: versions, parent_of={1: None, 2: 1, **parents}.get)
    adopted: list[AdapterVersion] = []
    sync: Any = SimpleNamespace(adapter="default", store=store, adopt=lambda made: adopted.append(made) or True)
    steps = NativeRollouts(Any, sync, Any, 1)
    steps.on_train_begin(None, SimpleNamespace(global_step=4), None, model=peft_model(new=True))
    assert [made.number for made in adopted] == [3]
    assert [re.search(told or "never", str(warned.message)) is not None for warned in recwarn] == (
        [True] if told else []
    )


def test_a_used_folder_without_a_checkpoint_is_not_to_be_resumed(tmp_path: Path) -> None:
    store = SimpleNamespace(head=version(1, None, 0), archive=tmp_path / "native")
    sync: Any = SimpleNamespace(adapter="default", store=store)
    steps, state = NativeRollouts(Any, sync, Any, 1), SimpleNamespace(global_step=0)
    args = SimpleNamespace(output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds a run at v1.* has no checkpoint yet: name another"):
        steps.on_train_begin(args, state, None, model=None)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=True\), or name another"):
        steps.on_train_begin(args, state, None, model=None)


@pytest.mark.parametrize("names", [("default", "ref"), ("mine",)])
def test_a_reference_that_trl_cannot_take_is_refused(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL ends in a ValueError or a KeyError; before an engine is started, and with the way out."""
    monkeypatch.setattr("lora_grpo.integrations.trl.VLLMEngine", None)
    model = get_peft_model(base_model(), LoraConfig(**LORA), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**LORA))
    with pytest.raises(ConfigError, match=r"delete_adapter|from_pretrained"):
        native_trainer(model, arguments(tmp_path), processing_class=tiny_tokenizer())


class WithoutEngine(NativeGRPOTrainer):
    __init__ = trl.GRPOTrainer.__init__


def test_resuming_from_a_trained_adapter_loads_it_and_keeps_its_reference(tmp_path: Path) -> None:
    """transformers loads the "ref" beside it only, so that the trained weights would be those of the start."""
    args = arguments(tmp_path, use_vllm=False, beta=0.1, eval_strategy="no", model_init_kwargs=None, use_cpu=True)
    trainer = WithoutEngine(
        model=peft_model(),
        reward_funcs=even,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 16}),
        processing_class=tiny_tokenizer(),
    )
    start = adapter_weights(trainer.model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in start:
                parameter.add_(1.0)
    trained = adapter_weights(trainer.model)
    trainer.model.save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    with pytest.raises(ConfigError, match=r"checkpoint has no trainer_state\.json, .*delete it, and resume again"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert not any(tensor.any() for name, tensor in trainer.model.named_parameters() if "lora_" in name)
    (tmp_path / "checkpoint" / "trainer_state.json").touch()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    found = adapter_weights(trainer.model)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    reference = dict(trainer.model.named_parameters())
    assert all(torch.equal(reference[name.replace(".default.", ".ref.")], start[name]) for name in start)
