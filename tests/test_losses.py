"""Every formula of the losses by hand, on one example small enough to work on paper.

Two rows of T = 3: the first has three tokens, the second two. Advantages 1 and -2, clip 0.2 below, 0.4 above.
Ratios r = pi / pi_old: (1.5, 1.0, 0.5) and (1.5, 0.5, -).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.head import token_logprobs
from lora_grpo.grpo.losses import (
    LOSSES,
    ClipRange,
    Objective,
    Size,
    Totals,
    cispo_surrogate,
    clip_events,
    clipped_surrogate,
    k3_kl,
    sequence_log_ratio,
)
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig

RATIO = torch.tensor([[1.5, 1.0, 0.5], [1.5, 0.5, 1.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
LOGP = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -9.0]])
ADVANTAGES = torch.tensor([1.0, -2.0])
CLIP = ClipRange(low=0.2, high=0.4)
TOTALS = Totals(update=Size(rows=2, tokens=5), rollout=Size(rows=4, tokens=16), max_completion_length=8)


def rows(advantages: torch.Tensor = ADVANTAGES, garbage: float = 0.0) -> Batch:
    return Batch(
        input_ids_BL=torch.ones(2, 4, dtype=torch.long),
        attention_mask_BL=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        mask_BT=MASK,
        sampler_logp_BT=torch.zeros(2, 3),
        advantages_B=advantages,
        old_logp_BT=torch.where(MASK, LOGP - RATIO.log(), garbage),
        ref_logp_BT=torch.where(MASK, LOGP + math.log(2), garbage),
    )


def objective(**changes: object) -> Objective:
    plain = {"epsilon": 0.2, "epsilon_high": 0.4, "vllm_importance_sampling_correction": False}
    return Objective(GRPOConfig(**{**plain, **changes}))


def test_clipped_surrogate_by_hand() -> None:
    """A = 1: -min(r, clip(r)) = -1.4 (clipped), -1, -0.5. A = -2: -min(-2r, -2 clip(r)) = 3, 1.6 (clipped)."""
    got = clipped_surrogate(RATIO, LOGP, ADVANTAGES[:, None], CLIP)
    torch.testing.assert_close(got[MASK], torch.tensor([-1.4, -1.0, -0.5, 3.0, 1.6]))


def test_two_sided_clip_bounds_what_a_negative_advantage_costs() -> None:
    """delta = 1.45: r = 1.5 counts as 1.45, so 2 * 1.45 = 2.9; with A = 1 the clip at 1.4 is the lower bound still."""
    got = clipped_surrogate(RATIO, LOGP, ADVANTAGES[:, None], ClipRange(0.2, 0.4, delta=1.45))
    torch.testing.assert_close(got[MASK], torch.tensor([-1.4, -1.0, -0.5, 2.9, 1.6]))


def test_cispo_surrogate_by_hand() -> None:
    """-min(r, 0.75) A log pi with the ratio held constant: 0.75, 1.5, 1.5 | -1.5, -2; gradients -0.75 A and so on."""
    logp = LOGP.clone().requires_grad_()
    ratio = RATIO * (logp - LOGP).exp()
    got = cispo_surrogate(ratio, logp, ADVANTAGES[:, None], ClipRange(0.2, 0.75))
    torch.testing.assert_close(got[MASK], torch.tensor([0.75, 1.5, 1.5, -1.5, -2.0]))
    got[MASK].sum().backward()
    torch.testing.assert_close(logp.grad[MASK], torch.tensor([-0.75, -0.75, -0.5, 1.5, 1.0]))


def test_sequence_ratio_is_the_geometric_mean() -> None:
    """GSPO: (1.5 * 1 * 0.5)^(1/3) and (1.5 * 0.5)^(1/2)."""
    got = sequence_log_ratio(LOGP, LOGP - RATIO.log(), MASK).exp()
    torch.testing.assert_close(got, torch.tensor([[0.75 ** (1 / 3)], [0.75**0.5]]))


def test_k3_by_hand() -> None:
    """log pi_ref - log pi = log 2: 2 - log 2 - 1. It is 0 where the policies agree and never negative."""
    got = k3_kl(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0 + math.log(2), -1.0]))
    torch.testing.assert_close(got, torch.tensor([1 - math.log(2), 0.0]))
    assert (k3_kl(torch.randn(100), torch.randn(100)) >= 0).all()


VALUES = {
    "grpo": ((-2.9 / 3) + (4.6 / 2)) / 2,
    "bnpo": (-2.9 + 4.6) / 5,
    "dr_grpo": (-2.9 + 4.6) / (2 * 8),
    "dapo": (-2.9 + 4.6) / (16 * 2 / 4),
    "cispo": (1.4 + 2.0 + 1.5 - 2.8 - 2.0) / (16 * 2 / 4),
}


def test_losses_by_hand() -> None:
    """Token losses -1.4 - 1 - 0.5 = -2.9 over 3 tokens and 3 + 1.6 = 4.6 over 2, of a rollout of 16 tokens in 4 rows.

    grpo is the mean of row means, bnpo the mean over 5 tokens, dr_grpo the sum over 2 * 8, dapo the sum over
    16 * 2/4 = 8 tokens. cispo bounded by 1.4: -min(r, 1.4) A log pi = 1.4, 2, 1.5, -2.8, -2: 0.1 / 8.
    """
    for loss_type, expected in VALUES.items():
        high = 1.4 if loss_type == "cispo" else 0.4
        got = objective(loss_type=loss_type, epsilon_high=high).value(LOGP, rows(), TOTALS)
        assert got.item() == pytest.approx(expected, rel=1e-5), loss_type


def test_each_loss_is_another() -> None:
    gradients = []
    for loss_type in LOSSES:
        logp = LOGP.clone().requires_grad_()
        objective(loss_type=loss_type).value(logp, rows(), TOTALS).backward()
        gradients.append(logp.grad)
    for i, left in enumerate(gradients):
        assert all((left - right).abs().max() > 1e-3 for right in gradients[:i])


def test_clipped_tokens_have_no_gradient() -> None:
    """r = 1.5 above 1.4 with A > 0, and r = 0.5 below 0.8 with A < 0; the same ratios the other way round have one."""
    logp = LOGP.clone().requires_grad_()
    objective(loss_type="bnpo").value(logp, rows(), TOTALS).backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, -1.0, -0.5], [3.0, 0.0, 0.0]]) / 5)


@pytest.mark.parametrize("unbiased", [True, False])
def test_kl_adds_its_weight_times_the_estimate(unbiased: bool) -> None:
    """ref = 2 pi everywhere: 1 - log 2 a token, which the ratio weighs by (1.5, 1) and (1.5, 0.5): means 1.25 and 1."""
    batch = replace(rows(), mask_BT=torch.tensor([[True, True, False], [True, True, False]]))
    plain, with_kl = (
        objective(loss_type="grpo", beta=beta, use_bias_correction_kl=unbiased).value(LOGP, batch, TOTALS).item()
        for beta in (0.0, 0.1)
    )
    mean_ratio = (1.25 + 1.0) / 2 if unbiased else 1.0
    assert with_kl - plain == pytest.approx(0.1 * (1 - math.log(2)) * mean_ratio, rel=1e-4)


def test_the_corrected_kl_has_the_gradient_of_the_reverse_kl() -> None:
    """Over a whole vocabulary, E_old[r k3] = KL(pi || ref): gradients agree to rounding; without r they do not."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], requires_grad=True)
    ref, old = torch.tensor([1.0, 0.2, -0.5, 0.0]).log_softmax(0), torch.tensor([0.0, 0.5, 0.5, -0.3]).log_softmax(0)
    exact = (logits.log_softmax(0).exp() * (logits.log_softmax(0) - ref)).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    logp = logits.log_softmax(0)
    corrected = (old.exp() * k3_kl(logp, ref) * (logp - old).exp()).sum()
    torch.testing.assert_close(torch.autograd.grad(corrected, logits, retain_graph=True)[0], expected)
    (plain,) = torch.autograd.grad((old.exp() * k3_kl(logp, ref)).sum(), logits)
    assert (plain - expected).abs().max() > 0.05


def test_correction_weighs_the_policy_loss_but_not_the_kl() -> None:
    """The sampler says log pi_sampler = log pi_old - log 2: each token's ratio is 2."""
    batch = replace(rows(), sampler_logp_BT=rows().old_logp_BT - math.log(2))
    correct = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate"}
    without, kl_only = (objective(loss_type="bnpo", beta=beta).value(LOGP, batch, TOTALS).item() for beta in (0.0, 0.1))
    with_both = objective(loss_type="bnpo", beta=0.1, **correct).value(LOGP, batch, TOTALS).item()
    assert with_both == pytest.approx(2 * without + (kl_only - without), rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_masked_reaches_neither_loss_nor_gradient(loss_type: str, level: str) -> None:
    """An infinite log-prob at a masked position: times a weight of 0 it would be NaN, in the gradient too."""
    chosen = objective(loss_type=loss_type, importance_sampling_level=level, beta=0.1)
    clean, dirty = LOGP.clone().requires_grad_(), torch.where(MASK, LOGP, -torch.inf).requires_grad_()
    values = [
        chosen.value(clean, rows(), TOTALS),
        chosen.value(dirty, rows(garbage=torch.inf), TOTALS),
    ]
    assert values[0].item() == values[1].item()
    for value in values:
        value.backward()
    torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)


def test_clip_events_by_hand() -> None:
    events = clip_events(RATIO, ADVANTAGES[:, None], CLIP)
    assert events["clip_ratio/high_mean"][MASK].tolist() == [True, False, False, False, False]
    assert events["clip_ratio/low_mean"][MASK].tolist() == [False, False, False, False, True]
    assert events["clip_ratio/region_mean"].sum() == 2


def test_metrics_by_hand() -> None:
    """One of 5 tokens clipped on each side; row shares are 0 and 1/2 below, 1/3 and 0 above. Entropies 1..5: mean 3."""
    chosen = objective(loss_type="dapo", beta=0.1, use_bias_correction_kl=False)
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 999.0]])
    metrics = Processes().metrics(chosen.observe(LOGP, entropy, rows()))
    expected = {
        "entropy": 3.0,
        "kl": 1 - math.log(2),
        "clip_ratio/low_mean": 0.2,
        "clip_ratio/high_mean": 0.2,
        "clip_ratio/region_mean": 0.4,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": 1 / 3,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_sampling_metrics_by_hand() -> None:
    """Old log-probs are -1.41, -2, -2.31 | -1.41, -1.31, a sampler's 0 makes gaps of that size; mean and largest."""
    chosen = objective(vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_truncate")
    metrics = Processes().metrics(chosen.observe_sampling(rows()))
    old = (LOGP - RATIO.log())[MASK]
    expected = {
        "sampling/sampling_logp_difference/mean": -old.mean().item(),
        "sampling/sampling_logp_difference/max": -old.min().item(),
        "sampling/importance_sampling_ratio/min": old.min().exp().item(),
        "sampling/importance_sampling_ratio/mean": old.exp().mean().item(),
        "sampling/importance_sampling_ratio/max": old.max().exp().item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_metrics_of_nothing_are_zero() -> None:
    empty = replace(rows(), mask_BT=torch.zeros_like(MASK))
    chosen = objective(beta=0.1, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_mask")
    observed = chosen.observe(LOGP, LOGP, empty) | chosen.observe_sampling(empty)
    assert set(Processes().metrics(observed).values()) == {0.0}


def test_token_logprobs_by_hand() -> None:
    """Logits log(1), log(3) at temperature 1/2 are log(1), log(9): p = 1/10 and 9/10."""
    logits = torch.tensor([[[1.0, 3.0]]]).log()
    logp, entropy = token_logprobs(logits, torch.tensor([[1]]), temperature=0.5)
    assert logp.item() == pytest.approx(math.log(0.9))
    assert entropy.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


@pytest.mark.parametrize("chunk", [1, 30, 100, 250, 10_000])
def test_chunks_change_no_logprob_and_no_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks below a token, of part of a row, of a row, of several rows, and one."""
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 7, 11), torch.randint(11, (5, 7))
    weights = torch.randn(5, 7)
    monkeypatch.setattr("lora_grpo.grpo.head._CHUNK_ELEMENTS", chunk)
    chunked = logits.clone().requires_grad_()
    logp, entropy = token_logprobs(chunked, ids, temperature=0.7)
    (logp * weights).sum().backward()
    whole = logits.clone().requires_grad_()
    expected = (whole / 0.7).log_softmax(2)
    (expected.gather(2, ids[..., None]).squeeze(2) * weights).sum().backward()
    torch.testing.assert_close(logp, expected.gather(2, ids[..., None]).squeeze(2))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(2))
    torch.testing.assert_close(chunked.grad, whole.grad)


def test_logprobs_of_bf16_logits_are_made_in_fp32() -> None:
    """In bf16, log-probs near -8 are rounded to 1/32 of a nat: more than the sampler's and the trainer's gap."""
    logits = torch.randn(1, 3, 4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp, entropy = token_logprobs(logits, torch.tensor([[5, 6, 7]]), temperature=1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    expected = logits.double().log_softmax(2)[0, torch.arange(3), torch.tensor([5, 6, 7])]
    torch.testing.assert_close(logp[0].double(), expected, rtol=1e-6, atol=1e-6)
