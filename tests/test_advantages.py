"""Advantages by hand, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_grpo.errors import ConfigError
from lora_grpo.grpo.advantages import group_advantages, nan_std, reward_metrics, weighted_rewards
from lora_grpo.grpo_config import GRPOConfig

NAN = torch.nan


def test_group_scaling_by_hand() -> None:
    """Rewards 1, 2, 3: mean 2, deviation sqrt((1 + 0 + 1) / 2) = 1, so -1/1.0001, 0, 1/1.0001."""
    got = group_advantages(torch.tensor([1.0, 2.0, 3.0]), 3)
    torch.testing.assert_close(got, torch.tensor([-1 / 1.0001, 0.0, 1 / 1.0001]))


def test_batch_scaling_by_hand() -> None:
    """Groups (0, 2), (4, 4): means 1, 4; the batch's mean is 2.5, its deviation sqrt((6.25+.25+2.25+2.25)/3)."""
    got = group_advantages(torch.tensor([0.0, 2.0, 4.0, 4.0]), 2, "batch")
    scale = (11 / 3) ** 0.5 + 1e-4
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / scale)


def test_no_scaling_by_hand() -> None:
    got = group_advantages(torch.tensor([0.0, 2.0, 4.0, 7.0]), 2, "none")
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.5, 1.5]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [3, 4, 6, 7, 13])
@pytest.mark.parametrize("reward", [0.7, 1 / 3, 1e-7, 0.123, -2e5 / 7])
def test_equal_rewards_teach_nothing(scale: str, size: int, reward: float) -> None:
    """Not nearly nothing: an advantage of rounding would count as signal, and move the policy under Adam."""
    for dtype in (torch.float32, torch.float64):
        assert (group_advantages(torch.full((2 * size,), reward, dtype=dtype), size, scale) == 0).all()


def test_large_rewards_keep_their_signal() -> None:
    """In float32 their squares are infinite, and so was the deviation: every advantage was 0."""
    got = group_advantages(torch.tensor([1e25, 2e25, 3e25]), 3)
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0]))


def test_a_row_without_a_reward_is_left_out_of_its_group() -> None:
    """(1, nan, 3): mean 2, deviation sqrt(2), the middle row 0. Counted as 0 it would have drawn the mean to 4/3."""
    got = group_advantages(torch.tensor([1.0, NAN, 3.0]), 3)
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0]) / (2**0.5 + 1e-4))


def test_a_group_with_one_reward_or_none_has_no_advantage() -> None:
    rewards = torch.tensor([NAN, NAN, 5.0, NAN])
    for scale in ("group", "none"):
        assert group_advantages(rewards, 2, scale).tolist() == [0.0] * 4


def test_weighted_sum_over_the_rewards_that_apply() -> None:
    """2*1 + 0.5*4 = 4; the second row has only the second reward, 0.5*6 = 3; the third has none."""
    rewards_BF = torch.tensor([[1.0, 4.0], [NAN, 6.0], [NAN, NAN]])
    got = weighted_rewards(rewards_BF, (2.0, 0.5))
    torch.testing.assert_close(got, torch.tensor([4.0, 3.0, NAN]), equal_nan=True)
    assert weighted_rewards(rewards_BF)[0] == 5.0


def test_a_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward_weights=\(1.0,\).*each of 2"):
        weighted_rewards(torch.zeros(4, 2), (1.0,))


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 rewards are not a multiple of num_generations=4"):
        group_advantages(torch.zeros(7), 4)


rewards_lists = st.lists(st.integers(-20, 20), min_size=8, max_size=8)


@given(rewards_lists, st.sampled_from(["group", "batch", "none"]), st.integers(-50, 50))
def test_shifting_a_group_changes_nothing_within_it(values: list[int], scale: str, shift: int) -> None:
    """All groups by the same amount: the batch's deviation would see a shift of one."""
    rewards = torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(
        group_advantages(rewards + shift, 4, scale), group_advantages(rewards, 4, scale), rtol=1e-3, atol=1e-4
    )


@given(rewards_lists, st.permutations(range(4)))
def test_order_within_a_group_is_of_no_account(values: list[int], order: list[int]) -> None:
    rewards_PG = torch.tensor(values, dtype=torch.float32).view(2, 4)
    straight = group_advantages(rewards_PG.flatten(), 4).view(2, 4)[:, order]
    torch.testing.assert_close(group_advantages(rewards_PG[:, order].flatten(), 4).view(2, 4), straight)


@given(rewards_lists)
def test_advantages_of_a_group_sum_to_nothing(values: list[int]) -> None:
    advantages = group_advantages(torch.tensor(values, dtype=torch.float32), 4).view(2, 4)
    assert advantages.sum(dim=1).abs().max() < 1e-4


def test_scaling_rewards_scales_only_unscaled_advantages() -> None:
    rewards = torch.tensor([1.0, 4.0, 2.0, 9.0])
    torch.testing.assert_close(group_advantages(10 * rewards, 4), group_advantages(rewards, 4), rtol=1e-3, atol=0)
    torch.testing.assert_close(group_advantages(10 * rewards, 4, "none"), 10 * group_advantages(rewards, 4, "none"))


def test_deviation_leaves_out_nan() -> None:
    """1, 3 of (1, nan, 3): sqrt(((1-2)^2 + (3-2)^2) / 1) = sqrt(2); of one value there is none."""
    assert nan_std(torch.tensor([1.0, NAN, 3.0])).item() == pytest.approx(2**0.5)
    assert nan_std(torch.tensor([[1.0, NAN], [4.0, 4.0]]), dim=1).squeeze(1).tolist() == [
        pytest.approx(NAN, nan_ok=True),
        0,
    ]


def test_reward_metrics_by_hand() -> None:
    """Totals 1, 3 | 2, 2: mean 2, deviation sqrt(2/3); one group of two has equal rewards."""
    rewards_BF = torch.tensor([[1.0, 0.0], [2.0, 1.0], [2.0, NAN], [1.0, 1.0]])
    metrics = reward_metrics(rewards_BF, ["length", "format"], GRPOConfig(num_generations=2))
    assert metrics["reward"] == 2.0
    assert metrics["reward_std"] == pytest.approx((2 / 3) ** 0.5)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/length/mean"] == 1.5
    assert metrics["rewards/format/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/format/std"] == pytest.approx((1 / 3) ** 0.5)
