"""Whose completion it is: the rule, on completions whose maker is known."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_grpo.bench.attribution import MIN_BUCKET, Rows, judge
from lora_grpo.bench.host import provenance

VERSIONS, SERVERS, TOKENS = 6, 2, 4
NOISE = 1e-3


def rows(
    apart: float, *, count: int = 240, noise: float = 1e-4, made_by: Tensor | None = None, seed: int = 0
) -> tuple[Rows, Tensor]:
    """Completions of 1..4 tokens by each version in turn, on either server, and who made them; neighbours differ by
    about `apart` nats per token, in directions of their own."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    logp_VBT = -1 + apart * normal(VERSIONS, count, TOKENS).cumsum(0)
    made_by = torch.arange(count) % VERSIONS if made_by is None else made_by
    sampler_BT = logp_VBT[made_by, torch.arange(count)] + noise * normal(count, TOKENS)
    length_B = 1 + torch.arange(count) // VERSIONS % TOKENS
    lists = [[row[:n].tolist() for row, n in zip(made, length_B, strict=True)] for made in (sampler_BT, *logp_VBT)]
    server_B = torch.arange(count) // (VERSIONS * TOKENS) % SERVERS
    return Rows.of(lists[1:], lists[0], made_by.tolist(), server_B.tolist()), made_by


def test_versions_that_lie_far_apart_are_told_apart() -> None:
    made, _ = rows(0.5)
    verdicts = judge(made, NOISE)
    assert (verdicts["checked"], verdicts["wrong"]) == (240, 0)
    assert verdicts["told_apart"] > 230
    assert verdicts["undecided"] == 0
    assert float(made.own_gap().mean()) < NOISE
    assert 0.1 < float(made.next_distance().mean()) < 0.6


def test_completions_of_another_version_are_seen() -> None:
    """Whatever the number they claim: the next one's, or every row one and the same."""
    made, made_by = rows(0.5)
    control = judge(made.next_stamped(), NOISE)
    assert control["wrong"] > 0.95 * control["checked"]
    stale = replace(made, stamped_B=torch.full_like(made_by, 3))
    verdicts = judge(stale, NOISE)
    assert verdicts["wrong"] + verdicts["inconclusive"] == verdicts["checked"] - 40 + (40 - verdicts["told_apart"])
    assert verdicts["told_apart"] <= 40
    last = made.next_stamped().stamped_B[made_by == VERSIONS - 1]
    assert (last == VERSIONS - 2).all()


def test_one_wrong_completion_among_many_is_found() -> None:
    made, made_by = rows(0.5)
    claimed = made_by.clone()
    claimed[17] = (claimed[17] + 2) % VERSIONS
    verdicts = judge(replace(made, stamped_B=claimed), NOISE)
    assert verdicts["wrong"] == 1


def test_what_noise_hides_in_a_completion_its_bucket_shows() -> None:
    """Versions so close that no completion by itself can be called wrong: a server that answers by another still is."""
    close, made_by = rows(4e-4, count=9600)
    alone = judge(close, NOISE)
    assert (alone["wrong"], alone["buckets_wrong"]) == (0, 0)
    assert 100 < alone["inconclusive"] < 0.5 * alone["checked"]
    stale = (made_by == 4) & (close.server_B == 1)
    claimed, server = made_by.masked_fill(stale, 5), close.server_B.masked_fill(stale, 2)
    verdicts = judge(replace(close, stamped_B=claimed, server_B=server), NOISE)
    assert verdicts["wrong"] < 0.1 * int(stale.sum())
    assert verdicts["buckets_wrong"] == 1
    few = stale.cumsum(0).le(MIN_BUCKET - 1) & stale
    claimed, server = made_by.masked_fill(few, 5), close.server_B.masked_fill(few, 2)
    assert judge(replace(close, stamped_B=claimed, server_B=server), NOISE)["buckets_wrong"] == 0


def test_versions_that_are_the_same_decide_nothing() -> None:
    made, _ = rows(0.0, noise=0.0)
    assert judge(made, NOISE) == {
        "checked": 240,
        "told_apart": 0,
        "wrong": 0,
        "inconclusive": 240,
        "buckets_told_apart": 0,
        "buckets_wrong": 0,
        "buckets_inconclusive": VERSIONS * SERVERS,
        "undecided": 240,
        "bucket_gap_share": 0.0,
    }


@pytest.mark.parametrize("noise", [0.0, NOISE])
def test_the_first_version_and_the_last_have_one_neighbour(noise: float) -> None:
    made, made_by = rows(0.5)
    nearest = made.next_distance()
    assert torch.isfinite(nearest).all()
    distance_VB = made.distance()
    assert torch.equal(nearest[made_by == 0], distance_VB[1][made_by == 0])
    assert torch.equal(nearest[made_by == VERSIONS - 1], distance_VB[VERSIONS - 2][made_by == VERSIONS - 1])
    assert judge(made, noise)["wrong"] == 0


def test_a_result_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/replicas.py", "--steps", "6", "--output", "a folder"])
    about = provenance("benchmarks/replicas.py")
    assert about["command"] == "python benchmarks/replicas.py --steps 6 --output 'a folder'"
    assert about["commit"]
    assert about["machine"]["cores"] >= 1
