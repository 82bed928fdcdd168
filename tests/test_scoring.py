"""Teacher-forced log-probs for proofs: what is asked for, and nothing that takes more memory than training does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_grpo.engines.delivery.agreement import take_canary
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.grpo import forward
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.forward import teacher_logprobs
from lora_grpo.policy import Policy
from lora_grpo.types import Completion
from tests.tiny_policy import config, peft_model, rollout

SEQUENCES = [[5, 9, 3, 7, 2, 8], [4, 4, 6], [9, 1, 2, 3, 5]]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows of each forward, and the tokens of it that went through the output layer."""
    seen: list[tuple[int, int]] = []

    def scores(model: Any, inputs: Any, ids_BT: Tensor, wanted_BT: Tensor, temperature: float) -> Any:
        seen.append((len(ids_BT), int(wanted_BT.sum())))
        return own(model, inputs, ids_BT, wanted_BT, temperature)

    own = forward.completion_scores
    monkeypatch.setattr(forward, "completion_scores", scores)
    return seen


def test_scores_from_a_token_on_are_those_of_the_whole_sequence(computed: list[tuple[int, int]]) -> None:
    model = peft_model()
    whole = teacher_logprobs(model, SEQUENCES, temperature=0.7)
    assert [len(row) for row in whole] == [5, 2, 4]
    starts = [4, 1, 5]
    parts = teacher_logprobs(model, SEQUENCES, starts=starts, temperature=0.7, rows=2)
    for row, part, start in zip(whole, parts, starts, strict=True):
        torch.testing.assert_close(part, row[start - 1 :])
    assert computed == [(3, 11), (2, 4), (1, 0)]


def test_a_canary_within_an_update_of_a_half_precision_base_scores_as_outside() -> None:
    """An update has autocast do what PEFT would; a proof in the middle of it has neither."""
    model = peft_model(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    outside = teacher_logprobs(model, SEQUENCES)
    inside: list[list[list[float]]] = []
    batch = Batch.from_groups(rollout(), torch.linspace(-1, 1, 8))
    Policy(model, config(8)).update(batch, judge=lambda _: inside.append(teacher_logprobs(model, SEQUENCES)))
    assert inside == [outside]


def test_a_canary_computes_completions_alone_in_the_trainers_batches(computed: list[tuple[int, int]]) -> None:
    """Whole sequences of eight rows at once took more memory than the step that they guard."""
    rows = [(ids[:2], Completion("", tuple(ids[2:]), (-1.0,) * len(ids[2:]), "stop", 1)) for ids in SEQUENCES]
    limits = {"known_noise": 0.1, "most_noise": 0.1}
    report = take_canary(
        peft_model(), FakeEngine(lambda prompt: "").logprobs, rows, nullcontext(), 1.0, batch_rows=2, **limits
    )
    assert report.tokens == sum(len(ids) - 2 for ids in SEQUENCES)
    assert max(rows for rows, _ in computed) == 2
    policy_and_base = 8 + 8
    assert sum(tokens for _, tokens in computed) == policy_and_base
