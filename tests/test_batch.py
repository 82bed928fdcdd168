"""Padding, masks and row selection of batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_grpo.errors import ConfigError
from lora_grpo.grpo.batch import Batch
from lora_grpo.types import Completion, Group

NAN = float("nan")


def completion(ids: tuple[int, ...], finish: str = "stop", mask: tuple[bool, ...] | None = None) -> Completion:
    return Completion("", ids, tuple(-0.5 * i for i in ids), finish, version=3, token_mask=mask)


GROUPS = [
    Group("", (11, 12), (completion((1, 2, 3)), completion((4,), "length"))),
    Group("", (13, 14, 15), (completion((5, 6), mask=(True, False)), completion((7, 8, 9, 10)))),
]
ADVANTAGES = torch.tensor([0.5, -0.5, 1.0, -1.0])


def batch(**changes: object) -> Batch:
    return Batch.from_groups(GROUPS, ADVANTAGES, **changes)


def test_prompts_pad_left_and_completions_right() -> None:
    got = batch()
    assert got.input_ids_BL.tolist() == [
        [0, 11, 12, 1, 2, 3, 0],
        [0, 11, 12, 4, 0, 0, 0],
        [13, 14, 15, 5, 6, 0, 0],
        [13, 14, 15, 7, 8, 9, 10],
    ]
    assert got.attention_mask_BL.tolist() == [
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert (len(got), got.prompt_length, got.completion_length) == (4, 3, 4)
    assert got.input_ids_BL[2, got.prompt_length :].tolist() == [5, 6, 0, 0]
    assert got.completion_mask_BT.tolist()[2] == [True, True, False, False]
    assert got.sampler_logp_BT.tolist()[0] == [-0.5, -1.0, -1.5, 0.0]


def test_positions_count_from_the_first_token() -> None:
    """An engine without padding gives a prompt's first token position 0."""
    assert batch().position_ids_BL.tolist()[0] == [0, 0, 1, 2, 3, 4, 4]


def test_tokens_that_the_policy_did_not_sample_are_no_loss() -> None:
    """They stay in the attention mask: later tokens were sampled after them."""
    got = batch()
    assert got.mask_BT.tolist()[2] == [True, False, False, False]
    assert got.attention_mask_BL[2].sum() == 5


def test_truncated_rows_leave_the_loss_only_when_asked() -> None:
    assert batch().mask_BT[1].tolist() == [True, False, False, False]
    got = batch(mask_truncated=True)
    assert got.mask_BT[1].tolist() == [False] * 4
    assert got.mask_BT[0].tolist() == [True, True, True, False]
    assert len(got) == 4


def test_a_log_prob_that_the_sampler_did_not_give_stays_unknown() -> None:
    row = Completion("", (1, 2), (NAN, -1.0), "stop", 1)
    got = Batch.from_groups([Group("", (5,), (row,))], torch.ones(1))
    assert got.sampler_logp_BT.isnan().tolist() == [[True, False]]


def test_selected_rows_lose_the_columns_that_others_needed() -> None:
    got = replace(batch(), old_logp_BT=torch.arange(16.0).view(4, 4)).select(torch.tensor([1, 0]))
    assert got.input_ids_BL.tolist() == [[11, 12, 4, 0, 0], [11, 12, 1, 2, 3]]
    assert (got.prompt_length, got.completion_length) == (2, 3)
    assert got.mask_BT.tolist() == [[True, False, False], [True, True, True]]
    assert got.advantages_B.tolist() == [-0.5, 0.5]
    assert got.old_logp_BT is not None
    assert got.old_logp_BT.tolist() == [[4, 5, 6], [0, 1, 2]]
    assert got.ref_logp_BT is None


def test_moving_takes_every_tensor_along() -> None:
    moved = replace(batch(), old_logp_BT=torch.zeros(4, 4)).to("meta")
    assert {t.device.type for t in (moved.input_ids_BL, moved.mask_BT, moved.advantages_B, moved.old_logp_BT)} == {
        "meta"
    }


@pytest.mark.parametrize(
    ("groups", "advantages", "message"),
    [
        (GROUPS, torch.zeros(3), "for 4 completions"),
        ([], torch.zeros(0), "for 0 completions"),
        ([Group("", (), (completion((1,)),))], torch.zeros(1), "row 0 has an empty prompt"),
        ([Group("", (1,), (completion(()),))], torch.zeros(1), "none of 1 completions has a token"),
        (
            [Group("", (1,), (Completion("", (1, 2), (-1.0,), "stop", 1),))],
            torch.zeros(1),
            r"differ in length: \[2, 1, 2\]",
        ),
        ([Group("", (1,), (completion((1, 2), mask=(True,)),))], torch.zeros(1), r"differ in length: \[2, 2, 1\]"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(groups: list[Group], advantages: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Batch.from_groups(groups, advantages)
