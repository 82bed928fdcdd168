"""Rows packed without padding, and each prompt once, give what padded rows give."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.llama import modeling_llama

from lora_grpo.grpo import forward
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.forward import teacher_logprobs
from lora_grpo.grpo.packing import pack, refusal
from lora_grpo.policy import Policy
from tests import families
from tests.tiny_policy import assert_same, config, drifted, gradient, one_thread, peft_model, rollout

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 0.7, -1.2, 0.0, 0.3, 0.9])
PROMPTS = (45, 6)
"""One of them longer than the sliding windows of the tiny models."""


def family_model(name: str) -> Any:
    family = families.FAMILIES[name]
    torch.manual_seed(0)
    model = families._class_of(family).from_config(families._config(family))
    families._fill(model, 0)
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch(**changes: Any) -> Batch:
    return Batch.from_groups(rollout(**{"prompt_lengths": PROMPTS, **changes}), ADVANTAGES)


@pytest.fixture
def tokens_of_forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of micro-batches that go through models, the last one's last."""
    shapes: list[tuple[int, ...]] = []
    for name in ("_packed", "_padded"):
        compute = getattr(forward.Forward, name)

        def counting(self: Any, rows: Batch, compute: Any = compute) -> Any:
            seen: list[tuple[int, ...]] = []
            handle = self._model.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
            )
            try:
                return compute(self, rows)
            finally:
                handle.remove()
                shapes.append(seen[-1])

        monkeypatch.setattr(forward.Forward, name, counting)
    return shapes


def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward.packing, "pays", lambda _: False)


def learned(model: Any, **changes: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient and the metrics of an update on policies that lie around this one, so that ratios are clipped."""
    policy = Policy(model, config(8, **{"beta": 0.1, "temperature": 0.7, **changes}))
    policy.logprobs(batch())  # whether rows are packed is known from here on
    rows = policy.prepare(batch())
    return gradient(policy, drifted(rows, policy.logprobs(rows)))


@pytest.mark.parametrize(
    "name", ["qwen2", "phi3", "gemma3", "gpt_oss", "llama4", "mixtral", "deepseek_v3", "qwen2_5_vl"]
)
def test_loss_gradient_and_metrics_are_those_of_padded_rows(
    name: str, monkeypatch: pytest.MonkeyPatch, tokens_of_forwards: list[tuple[int, ...]]
) -> None:
    """Also behind windows and chunks of attention, with sinks, in mixtures of experts and in wrappers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rows are padded")
        got, metrics = learned(family_model(name))
    rows = batch()
    prompts, completions = sum(PROMPTS), int(rows.completion_mask_BT.sum())
    assert tokens_of_forwards[-1] == (1, prompts + completions)
    padded(monkeypatch)
    expected, padded_metrics = learned(family_model(name))
    assert tokens_of_forwards[-1] == tuple(rows.input_ids_BL.shape)
    assert any(tensor.abs().max() > 1e-3 for tensor in expected.values())
    assert_same(expected, got, rtol=2e-4)
    assert metrics == pytest.approx(padded_metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"loss_type": "grpo", "beta": 0.0}])
def test_checkpointing_and_a_reference_change_nothing(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    got = learned(peft_model(), **changes)
    padded(monkeypatch)
    expected = learned(peft_model(), **changes)
    assert_same(expected[0], got[0])
    assert got[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("granitemoehybrid", "a state .linear"), ("lfm2", "a state .conv"), ("falcon", "not called span by span")],
)
def test_what_cannot_be_packed_is_padded_with_a_reason(
    name: str, reason: str, tokens_of_forwards: list[tuple[int, ...]]
) -> None:
    with pytest.warns(UserWarning, match=f"rows are padded.*{reason}"):
        learned(family_model(name))
    assert {shape[0] for shape in tokens_of_forwards} == {8}


def test_a_model_file_without_its_own_eager_attention_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    assert refusal(model) is None
    monkeypatch.delattr(modeling_llama, "eager_attention_forward")
    assert "attention (eager)" in str(refusal(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_says_something_else_of_packed_rows_gets_padded_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one counts positions on its own: right for one row, wrong where several stand in one."""

    def counts(_: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask", torch.ones_like(kwargs["input_ids"]))
        return args, {**kwargs, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def model() -> Any:
        made = peft_model(dtype=dtype)
        made.get_base_model().register_forward_pre_hook(counts, with_kwargs=True)
        return made

    with pytest.warns(UserWarning, match=r"rows are padded.* nats off"):
        got, _ = learned(model())
    padded(monkeypatch)
    expected, _ = learned(model())
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_bf16_base_is_packed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(peft_model(dtype=torch.bfloat16))


def test_dropout_is_of_each_forward_alone() -> None:
    """Scores have none; an update of packed rows has it, and another one each time."""
    model = peft_model(dropout=0.5)
    policy = Policy(model, config(8))
    rows = policy.prepare(batch())
    exact = Policy(peft_model(), config(8)).prepare(batch())
    torch.testing.assert_close(rows.old_logp_BT, exact.old_logp_BT)
    first, again = (gradient(policy, rows)[0] for _ in range(2))
    assert any(not torch.equal(first[name], again[name]) for name in first)


def test_rows_of_one_length_and_no_common_prompt_stay_padded(tokens_of_forwards: list[tuple[int, ...]]) -> None:
    """Nothing is saved, so nothing changes to the bit."""
    policy = Policy(peft_model(), config(8))
    rows = batch()
    alone = replace(rows, input_ids_BL=torch.randint(2, 60, rows.input_ids_BL.shape))
    alone = replace(alone, attention_mask_BL=torch.ones_like(rows.attention_mask_BL))
    policy.logprobs(alone)
    assert tokens_of_forwards == [tuple(rows.input_ids_BL.shape)]


@pytest.mark.parametrize("most", [1, 60, 75, 1000])
def test_a_budget_of_tokens_cuts_without_changing_the_gradient(
    most: int, tokens_of_forwards: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest() -> tuple[int, int]:
        """How many forwards an update takes, and the most tokens of one."""
        del tokens_of_forwards[:]
        cut, cut_metrics = learned(peft_model(), max_tokens_per_micro_batch=most)
        assert_same(whole, cut)
        assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        forwards = len(tokens_of_forwards) // 5
        return forwards, max(rows * length for rows, length in tokens_of_forwards[-4 * forwards :])

    whole, metrics = learned(peft_model())
    row = PROMPTS[0] + 7
    forwards, tokens = largest()
    assert tokens <= max(most, row)
    padded(monkeypatch)
    padded_forwards, tokens = largest()
    assert tokens <= max(most, row)
    assert padded_forwards > forwards if row < most < 8 * row else padded_forwards == forwards


def test_scores_for_proofs_are_packed_once_the_model_is_known_to_take_it() -> None:
    model = peft_model()
    sequences = [[*group.prompt_token_ids, *one.token_ids] for group in rollout(PROMPTS) for one in group.completions]
    starts = [length for length in PROMPTS for _ in range(4)]
    expected = teacher_logprobs(model, sequences, starts=starts)
    Policy(model, config(8)).logprobs(batch())
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    got = teacher_logprobs(model, sequences, starts=starts)
    assert seen == [sum(PROMPTS) + sum(map(len, expected))]
    for row, expected_row in zip(got, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-4)


def test_a_row_holds_each_prompt_once() -> None:
    row = pack([[5, 6, 7], [5, 6, 8, 9], [1, 2], [5, 6]], [2, 2, 1, 2])
    assert row.ids == [5, 6, 7, 8, 9, 1, 2]
    assert row.positions == [0, 1, 2, 2, 3, 0, 1]
    assert [tuple(span) for span in row.spans] == [(0, 3, 0, 0), (3, 5, 0, 2), (5, 7, 5, 0)]
    assert (row.predicting, row.scored) == ([1, 1, 3, 5], [7, 8, 9, 2])
