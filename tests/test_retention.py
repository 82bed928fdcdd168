"""Retention rules, alone."""

from __future__ import annotations

import pytest

from lora_grpo.adapters.upkeep.retention import (
    Candidates,
    Retention,
    keep_archived,
    keep_best,
    keep_every,
    keep_latest,
    keep_trainer_state,
)
from lora_grpo.errors import ConfigError


def candidates(**rewards: object) -> Candidates:
    return {int(name[1:]): {} if reward is None else {"reward": reward} for name, reward in rewards.items()}


TEN = candidates(**{f"v{n}": None for n in range(1, 11)})


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), set(range(1, 11))),
        (keep_latest(3), {8, 9, 10}),
        (keep_latest(99), set(range(1, 11))),
        (keep_every(4), {4, 8}),
        (keep_latest(1) | keep_every(5), {5, 10}),
        (keep_every(5) | keep_latest(1), {5, 10}),
    ],
)
def test_by_number(retention: Retention, kept: set[int]) -> None:
    assert retention.kept("tmpfs", TEN) == kept
    assert retention.kept("tmpfs", dict(reversed(TEN.items()))) == kept


def test_best_counts_only_finite_numbers_and_prefers_the_newer() -> None:
    scored = candidates(
        v1=0.5, v2=float("nan"), v3=0.9, v4=None, v5=0.9, v6="high", v7=0.1, v8=True, v9=float("inf"), v10=0
    )
    assert keep_best("reward").kept("tmpfs", scored) == {5}
    assert keep_best("reward", 3).kept("tmpfs", scored) == {1, 3, 5}
    assert keep_best("reward", 1, mode="min").kept("tmpfs", scored) == {10}
    assert keep_best("loss").kept("tmpfs", scored) == set()


def test_places_have_their_own_rules() -> None:
    retention = keep_latest(2) | keep_archived(keep_every(3)) | keep_trainer_state(keep_latest(1) | keep_every(9))
    assert retention.kept("tmpfs", TEN) == {9, 10}
    assert retention.kept("archive", TEN) == {3, 6, 9}
    assert retention.kept("state", TEN) == {9, 10}
    assert keep_latest(2).kept("state", TEN) == set(range(1, 11))
    assert keep_latest(2).limits("tmpfs")
    assert not keep_latest(2).limits("archive")


def test_bad_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep_latest\(0\)"):
        keep_latest(0)
    with pytest.raises(ConfigError, match="mode='most'"):
        keep_best("reward", mode="most")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="plain rules"):
        keep_trainer_state(keep_trainer_state(keep_latest(1)))
