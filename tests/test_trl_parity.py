"""The algorithm against TRL 1.16's own code, on the same rollouts, rewards, weights and drift.

TRL's `GRPOTrainer` is real: it is given our completions by its `rollout_func`, computes rewards, advantages, masks, old
and reference log-probs, correction ratios, losses and metrics itself. Between generation and loss, both adapters move
by the same step, so that ratios lie beyond every clip.

Deliberate differences. TRL's `bnpo` divides by the tokens of each micro-batch, ours by those of the optimizer batch, so
that gradient accumulation is exact: they are equal on one micro-batch, and on several with equally many tokens. Metrics
are compared on one micro-batch: over several, TRL averages the micro-batches' means, ours weighs each token. Rows that
cannot move the policy (advantage 0, no KL) are not computed again: in the mean entropy theirs is the one before the
rollout's first update, which is TRL's too until the policy has moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lora_grpo.grpo.advantages import group_advantages, reward_metrics, weighted_rewards
from lora_grpo.grpo.batch import Batch
from lora_grpo.policy import Policy
from lora_grpo.types import Completion, Group
from tests.tiny_policy import (
    EOS,
    PAD,
    VOCAB,
    assert_same,
    base_model,
    config,
    gradient,
    one_thread,
    peft_model,
    rollout,
    trained_from_new,
)

trl = pytest.importorskip("trl")
from trl.trainer.utils import split_tensor_dict  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM", "ignore:.torch.jit:DeprecationWarning"),
]

FIRST = [1.0, 0.0, 0.5, 2.0, 0.3, 0.3, 0.3, 0.3, 0.0, 1.0, None, 4.0, 1.0, 1.0, 0.0, 0.2]
SECOND = [0.0, 1.0, None, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 0.0, None, 1.0, 0.0, None, 1.0, 3.0]
"""Four groups of four: the second teaches nothing, a row of the third has no reward, others lack one of the two."""

WEIGHTS = (1.0, 0.5)


def groups(truncated: int = 0, longest: int = 7) -> list[Group]:
    return rollout(prompt_lengths=(3, 5, 2, 9), longest=longest, truncated=truncated)


def with_sampler(rows: list[Group], logp_BT: Tensor) -> list[Group]:
    """The completions with log-probs of a sampler that differs from the trainer by up to about 0.6 nats per token.

    One token has none, as where vLLM returns NaN.
    """
    noise = torch.Generator().manual_seed(1)
    sampled: list[Group] = []
    at = 0
    for group in rows:
        completions = []
        for row in group.completions:
            near = logp_BT[at, : len(row.token_ids)] + 0.3 * torch.randn(len(row.token_ids), generator=noise)
            logprobs = [math.nan, *near[1:].tolist()] if at == 5 else near.tolist()
            completions.append(Completion("", row.token_ids, tuple(logprobs), row.finish_reason, 1, row.token_mask))
            at += 1
        sampled.append(Group("", group.prompt_token_ids, tuple(completions)))
    return sampled


def first(prompts: Sequence[str], completions: Sequence[str], first: list[Any], **_: Any) -> list[Any]:
    return first


def second(prompts: Sequence[str], completions: Sequence[str], second: list[Any], **_: Any) -> list[Any]:
    return second


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def trl_trainer(folder: Path, *, trained: bool = False, **changes: Any) -> Any:
    """TRL's trainer with the adapter of `peft_model`, told that vLLM samples.

    The adapter is new when it is built, and the reference is the base, unless it is `trained`, and is the reference.
    """
    from datasets import Dataset

    plain = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 10,
        "reward_weights": list(WEIGHTS),
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
    }
    trainer = trl.GRPOTrainer(
        model=peft_model() if trained else base_model(),
        reward_funcs=[first, second],
        args=trl.GRPOConfig(str(folder), **{**plain, **changes}),
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * 16}),
        processing_class=tokenizer(),
        peft_config=None if trained else LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainer.model.load_state_dict(peft_model().state_dict(), strict=False)
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def drift(model: torch.nn.Module) -> None:
    """One step of the adapter, the same for models of the same parameter names."""
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name and ".ref." not in name:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))


def trl_rollout(trainer: Any, rows: list[Group]) -> dict[str, Any]:
    """What TRL makes of the completions before its loss: masks, advantages, log-probs, ratios."""
    pairs = [(group, row) for group in rows for row in group.completions]
    produced = {
        "prompt_ids": [list(group.prompt_token_ids) for group, _ in pairs],
        "completion_ids": [list(row.token_ids) for _, row in pairs],
        "logprobs": [[None if math.isnan(logp) else logp for logp in row.logprobs] for _, row in pairs],
    }
    if pairs[0][1].token_mask is not None:
        produced["env_mask"] = [[int(sampled) for sampled in row.token_mask or ()] for _, row in pairs]
    trainer.rollout_func = lambda prompts, _: produced
    inputs = [{"prompt": "w2", "first": a, "second": b} for a, b in zip(FIRST, SECOND, strict=True)]
    made: dict[str, Any] = trainer._generate_and_score_completions(inputs)
    return made


def trl_gradient(trainer: Any, parts: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient that TRL's micro-batches sum to."""
    total = 0.0
    for part in parts:
        loss = trainer.compute_loss(trainer.model, part)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def both(
    folder: Path,
    *,
    rows: list[Group] | None = None,
    micro_batches: int = 1,
    trained: bool = False,
    **case: Any,
) -> tuple[tuple[float, dict[str, Tensor], dict[str, float]], tuple[float, dict[str, Tensor], dict[str, float]]]:
    """Loss, gradient and metrics of TRL and of ours. Settings have the same names in both."""
    cut = {"per_device_train_batch_size": 16 // micro_batches, "gradient_accumulation_steps": micro_batches, **case}
    trainer = trl_trainer(folder, trained=trained, **cut)
    settings = config(16, reward_weights=WEIGHTS, **cut)
    policy = Policy(peft_model(), settings) if trained else trained_from_new(settings)
    rows = groups() if rows is None else rows
    plain = Batch.from_groups(rows, torch.zeros(16))
    rows = with_sampler(rows, policy.logprobs(plain))

    made = trl_rollout(trainer, rows)
    batch, metrics = our_batch(policy, rows)
    torch.testing.assert_close(batch.advantages_B, made["advantages"], rtol=1e-5, atol=1e-6)
    assert torch.equal(batch.mask_BT, (made["completion_mask"] * made.get("tool_mask", 1)).bool())

    drift(trainer.model)
    drift(policy.model)
    trl_loss, trl_grad = trl_gradient(trainer, split_tensor_dict(made, micro_batches))
    our_grad, updated = gradient(policy, batch)
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    metrics |= updated
    return (trl_loss, trl_grad, logged), (metrics["loss"], our_grad, metrics)


def our_batch(policy: Policy, rows: list[Group]) -> tuple[Batch, dict[str, float]]:
    settings = policy.config
    rewards_BF = torch.tensor(
        [[math.nan if r is None else r for r in pair] for pair in zip(FIRST, SECOND, strict=True)]
    )
    totals_B = weighted_rewards(rewards_BF, settings.reward_weights)
    metrics = reward_metrics(rewards_BF, ["first", "second"], settings)
    advantages_B = group_advantages(totals_B, settings.num_generations, settings.scale_rewards)
    batch = Batch.from_groups(rows, advantages_B, mask_truncated=settings.mask_truncated_completions)
    return policy.prepare(batch), metrics


def assert_equal(theirs: tuple[float, dict[str, Tensor], Any], ours: tuple[float, dict[str, Tensor], Any]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-6)
    assert max(tensor.abs().max() for tensor in theirs[1].values()) > 1e-3
    assert_same(theirs[1], ours[1])


def assert_metrics_equal(theirs: dict[str, float], ours: dict[str, float]) -> None:
    """Every metric of TRL's but lengths and counts, which come from the trainer.

    Without a KL (no `kl` among them), the entropy of a quarter of the rows is the one before the drift.
    """
    compared = {name: value for name, value in theirs.items() if not name.startswith(("completions/", "num_tokens"))}
    assert len(compared) >= 13
    if "kl" not in compared:
        assert ours["entropy"] == pytest.approx(compared.pop("entropy"), rel=1e-2)
    assert {name: ours[name] for name in compared} == pytest.approx(compared, rel=1e-4, abs=1e-6)


CASES = {
    **{loss: {"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")},
    **{f"{loss}-kl": {"loss_type": loss, "beta": 0.1} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    "gspo-kl": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "beta": 0.1},
    "dapo-sequence": {"importance_sampling_level": "sequence", "epsilon": 3e-2},
    "cispo-sequence": {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.02},
    "plain-kl": {"beta": 0.1, "use_bias_correction_kl": False},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.4},
    "cispo-5": {"loss_type": "cispo", "epsilon_high": 5.0},
    "two-sided": {"loss_type": "grpo", "delta": 1.3},
    "two-sided-below-the-clip": {"epsilon_high": 0.4, "delta": 1.1, "beta": 0.05},
    "temperature": {"temperature": 0.7, "beta": 0.1},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    **{
        f"{mode}-{low}": {
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.3,
            "vllm_importance_sampling_clip_min": low,
            "loss_type": "grpo",
            "beta": 0.1,
        }
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        for low in (None, 0.8)
    },
    # Uncorrected, TRL keeps old log-probs only when a rollout outlives an update.
    "uncorrected": {"vllm_importance_sampling_correction": False, "num_iterations": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_metrics(name: str, tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, **CASES[name])
    assert_equal(theirs, ours)
    assert_metrics_equal(theirs[2], ours[2])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "beta" in case])
def test_from_a_trained_adapter(name: str, tmp_path: Path) -> None:
    """TRL's reference is then a copy of it: far from the base's, and left by the drift alone."""
    theirs, ours = both(tmp_path / "trained", trained=True, **CASES[name])
    assert_equal(theirs, ours)
    assert_metrics_equal(theirs[2], ours[2])
    assert 0 < ours[2]["kl"] < 0.5 * both(tmp_path / "new", **CASES[name])[1][2]["kl"]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_two_micro_batches(loss_type: str, beta: float, tmp_path: Path) -> None:
    assert_equal(*both(tmp_path, micro_batches=2, loss_type=loss_type, beta=beta))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_truncated_completions_masked(loss_type: str, tmp_path: Path) -> None:
    rows = groups(truncated=3)
    theirs, ours = both(tmp_path, rows=rows, loss_type=loss_type, mask_truncated_completions=True, beta=0.1)
    assert_equal(theirs, ours)
    assert_metrics_equal(theirs[2], ours[2])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_that_the_policy_did_not_sample(level: str, tmp_path: Path) -> None:
    """TRL's env_mask is our token_mask: every third token came from a tool."""
    rows = [
        Group(
            "",
            group.prompt_token_ids,
            tuple(
                Completion(
                    "", row.token_ids, row.logprobs, "stop", 1, tuple(i % 3 != 1 for i in range(len(row.token_ids)))
                )
                for row in group.completions
            ),
        )
        for group in groups()
    ]
    theirs, ours = both(tmp_path, rows=rows, loss_type="grpo", importance_sampling_level=level, beta=0.1)
    assert_equal(theirs, ours)
    assert_metrics_equal(theirs[2], ours[2])


def test_the_cases_exercise_every_clip(tmp_path: Path) -> None:
    """On both sides, for tokens; and a correction that drops or truncates some rows, not all."""
    _, (_, _, metrics) = both(tmp_path, **CASES["clip-higher"])
    assert metrics["clip_ratio/low_mean"] > 0.01
    assert metrics["clip_ratio/high_mean"] > 0.01
    _, (_, _, metrics) = both(tmp_path, **CASES["gspo"])
    assert metrics["clip_ratio/low_mean"] > 0.05
    assert metrics["clip_ratio/high_mean"] > 0.05
    _, (_, _, metrics) = both(tmp_path, **CASES["sequence_mask-0.8"])
    assert metrics["sampling/importance_sampling_ratio/min"] == 0.0
    assert 0.1 < metrics["sampling/importance_sampling_ratio/mean"] < 0.9


def test_the_losses_differ_here(tmp_path: Path) -> None:
    """Equality with TRL would say little if every loss gave the same gradient. bnpo is dapo on one optimizer batch."""
    gradients = [
        torch.cat([g.flatten() for g in both(tmp_path, loss_type=loss)[1][1].values()])
        for loss in ("grpo", "bnpo", "dr_grpo", "cispo")
    ]
    for i, left in enumerate(gradients):
        assert all((left - right).abs().max() > 1e-2 * left.abs().max() for right in gradients[:i])


def test_bnpo_of_two_micro_batches_with_equally_many_tokens(tmp_path: Path) -> None:
    """One-token completions."""
    assert_equal(*both(tmp_path, rows=groups(longest=1), micro_batches=2, loss_type="bnpo"))


def test_where_bnpo_differs(tmp_path: Path) -> None:
    """TRL's gradient over two micro-batches is the mean of the two halves' own, and not that of the whole batch."""
    theirs, ours = both(tmp_path, micro_batches=2, loss_type="bnpo")
    policy = Policy(peft_model(), config(8, loss_type="bnpo", generation_batch_size=16))
    rows = groups()
    rows = with_sampler(rows, policy.logprobs(Batch.from_groups(rows, torch.zeros(16))))
    whole, _ = our_batch(Policy(peft_model(), config(16, reward_weights=WEIGHTS)), rows)
    drift(policy.model)
    halves = [gradient(policy, whole.select(rows))[0] for rows in torch.arange(16).split(8)]
    assert_same(theirs[1], {name: (halves[0][name] + halves[1][name]) / 2 for name in theirs[1]})
    assert any((theirs[1][name] - ours[1][name]).abs().max() > 1e-3 for name in ours[1])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_two_optimizer_batches_of_one_rollout(loss_type: str, tmp_path: Path) -> None:
    """TRL normalises dapo and cispo by the rollout's tokens an optimizer batch. In the sum, row order has no say."""
    case = {"per_device_train_batch_size": 8, "loss_type": loss_type, "generation_batch_size": 16}
    trainer = trl_trainer(tmp_path, **case)
    policy = Policy(peft_model(), config(8, reward_weights=WEIGHTS, learning_rate=1e-12, **case))
    rows = groups()
    rows = with_sampler(rows, policy.logprobs(Batch.from_groups(rows, torch.zeros(16))))
    made = trl_rollout(trainer, rows)
    batch, _ = our_batch(policy, rows)
    drift(trainer.model)
    drift(policy.model)
    _, theirs = trl_gradient(trainer, split_tensor_dict(made, 2))
    steps: list[dict[str, Tensor]] = []
    policy.optimizer.register_step_pre_hook(
        lambda *_: steps.append({name: p.grad.clone() for name, p in policy.parameters.items()})
    )
    policy.update(batch)
    assert len(steps) == 2
    assert_same(theirs, {name: steps[0][name] + steps[1][name] for name in theirs})
