"""The weights that correct for a sampler that is not quite the trainer, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lora_grpo.grpo.losses import known_gaps, sampling_ratio

LN2 = math.log(2)
MASK = torch.tensor([[True, True, True], [True, True, False]])
SAMPLER = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
OLD = SAMPLER + torch.tensor([[LN2, LN2, -LN2], [2 * LN2, LN2, 99.0]])
"""Ratios 2, 2, 1/2 (product 2) and 4, 2 (product 8); what is masked is garbage."""

EXPECTED = {
    ("token_truncate", None): [[2, 2, 0.5], [3, 2, 1]],
    ("token_truncate", 1.5): [[2, 2, 1.5], [3, 2, 1.5]],
    ("token_mask", None): [[2, 2, 0.5], [0, 2, 1]],
    ("token_mask", 0.75): [[2, 2, 0], [0, 2, 1]],
    ("sequence_truncate", None): [[2], [3]],
    ("sequence_truncate", 2.5): [[2.5], [3]],
    ("sequence_mask", None): [[2], [0]],
    ("sequence_mask", 2.5): [[0], [0]],
}


@pytest.mark.parametrize(("mode", "clip_min"), EXPECTED)
def test_modes_by_hand(mode: str, clip_min: float | None) -> None:
    """Ratios above 3 are truncated to 3 or dropped; so are those below `clip_min`. A masked token has ratio 1."""
    got = sampling_ratio(OLD, SAMPLER, MASK, mode, (clip_min, 3.0))
    torch.testing.assert_close(got, torch.tensor(EXPECTED[mode, clip_min], dtype=torch.float32))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_a_faithful_sampler_is_not_corrected(mode: str) -> None:
    assert (sampling_ratio(OLD, OLD, MASK, mode, (None, 3.0)) == 1).all()


def test_a_token_that_the_sampler_did_not_score_counts_as_faithful() -> None:
    """Row 0 without its first token has 2 * 1/2 = 1; a NaN would have reached the loss."""
    sampler = SAMPLER.clone()
    sampler[0, 0] = torch.nan
    assert sampling_ratio(OLD, sampler, MASK, "sequence_mask", (None, 3.0))[0].item() == pytest.approx(1.0)
    assert known_gaps(OLD, sampler, MASK).tolist() == pytest.approx([LN2, LN2, 2 * LN2, LN2])


@pytest.mark.parametrize(("mode", "weight"), [("token_mask", 0.0), ("token_truncate", 3.0)])
def test_a_token_that_the_sampler_called_impossible_is_bounded(mode: str, weight: float) -> None:
    sampler = torch.tensor([[-torch.inf, -1.0]])
    got = sampling_ratio(torch.full((1, 2), -1.0), sampler, torch.ones(1, 2, dtype=torch.bool), mode, (None, 3.0))
    assert got.tolist() == [[weight, 1.0]]


def test_what_is_masked_has_no_say() -> None:
    for mode in ("token_mask", "sequence_truncate"):
        other = torch.where(MASK, OLD, torch.inf)
        ours = sampling_ratio(OLD, SAMPLER, MASK, mode, (None, 3.0))
        torch.testing.assert_close(sampling_ratio(other, SAMPLER, MASK, mode, (None, 3.0)), ours)
