"""The policy on a real (tiny) PEFT model: its log-probs, and gradients that do not depend on how a batch is cut."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lora_grpo.errors import ConfigError, DeliveryError, TrainingError, UnsupportedAdapter
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.losses import LOSSES, Size, Totals
from lora_grpo.grpo.optimizer import build_optimizer
from lora_grpo.policy import Policy
from tests.tiny_policy import (
    VOCAB,
    adapter_weights,
    assert_same,
    base_model,
    config,
    cut_below,
    drifted,
    gradient,
    one_thread,
    peft_model,
    rollout,
    trained_from_new,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 0.7, -1.2, 0.0, 0.3, 0.9])


def make_policy(rows: int = 8, model: Any = None, **changes: Any) -> Policy:
    return Policy(model or peft_model(), config(rows, **changes))


def make_batch(advantages: Tensor = ADVANTAGES, **changes: Any) -> Batch:
    return Batch.from_groups(rollout(**changes), advantages)


def drifted_batch(policy: Policy, **changes: Any) -> Batch:
    """Prepared, with old, sampler and reference policies 0.4 nats away: ratios on both sides of each clip."""
    batch = policy.prepare(make_batch(**changes))
    return drifted(batch, policy.logprobs(batch))


def row_logprobs(model: Any, batch: Batch, row: int, temperature: float) -> Tensor:
    """Of one row on its own, without padding, mask or positions."""
    ids = batch.input_ids_BL[row][batch.attention_mask_BL[row].bool()]
    length = int(batch.completion_mask_BT[row].sum())
    with torch.no_grad():
        logp = (model(input_ids=ids[None]).logits[0, -length - 1 : -1] / temperature).log_softmax(1)
    return logp.gather(1, ids[-length:, None]).squeeze(1)


@contextmanager
def counted_rows(policy: Policy) -> Iterator[list[int]]:
    """The row counts of the forwards made meanwhile, packed or padded."""
    counts: list[int] = []

    def counting(compute: Any) -> Any:
        return lambda rows: (counts.append(len(rows)), compute(rows))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_packed", "_padded"):
            patch.setattr(policy.forward, name, counting(getattr(policy.forward, name)))
        yield counts


# Log-probs.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [8, 3])
def test_logprobs_are_those_of_each_row_alone(temperature: float, rows: int) -> None:
    """Guards alignment, left padding, positions, the temperature, and rows put back in their order."""
    policy = make_policy(rows, temperature=temperature)
    batch = make_batch()
    got = policy.logprobs(batch)
    for row in range(len(batch)):
        alone = row_logprobs(policy.model, batch, row, temperature)
        torch.testing.assert_close(got[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert (got[row, len(alone) :] == 0).all()


def test_left_padding_moves_no_position() -> None:
    """GPT-2 learns a vector a position, where rotary models only see differences of positions."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.5}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=None, eos_token_id=1, **shape)).eval()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    policy, batch = make_policy(model=model), make_batch()
    got = policy.logprobs(batch)
    model.eval()
    for row in range(len(batch)):
        alone = row_logprobs(model, batch, row, 1.0)
        torch.testing.assert_close(got[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_the_reference_of_a_new_adapter_is_the_base_model() -> None:
    policy, base = trained_from_new(config(8, beta=0.1)), base_model()
    batch = make_batch()
    got = policy.reference_logprobs(batch)
    for row in range(len(batch)):
        alone = row_logprobs(base, batch, row, 1.0)
        torch.testing.assert_close(got[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    assert (got - policy.logprobs(batch)).abs().max() > 0.1


def test_the_reference_of_a_trained_adapter_is_that_adapter() -> None:
    """As in TRL. To the bare base it was 63 nats per token away at the first step."""
    policy = make_policy(beta=0.1)
    batch = policy.prepare(make_batch())
    assert torch.equal(batch.ref_logp_BT, batch.old_logp_BT)
    assert policy.update(batch)["kl"] == 0.0
    weights = adapter_weights(policy.model)
    moved = policy.prepare(make_batch())
    assert torch.equal(moved.ref_logp_BT, batch.ref_logp_BT)
    assert (moved.ref_logp_BT - moved.old_logp_BT).abs().max() > 1e-6
    assert all(torch.equal(weights[name], tensor) for name, tensor in adapter_weights(policy.model).items())


def test_a_reference_of_the_users_own_is_refused() -> None:
    """TRL would not take it either: its own copy has this name."""
    model = peft_model()
    model.add_adapter("ref", LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match=r"adapter 'ref'.*a copy of 'default' as it is now.*delete_adapter\('ref'\)"):
        make_policy(model=model, beta=0.1)
    make_policy(model=model)
    model.delete_adapter("ref")
    make_policy(model=model, beta=0.1)


@pytest.mark.parametrize("trained", [False, True])
def test_the_adapter_is_back_after_the_reference_even_when_it_fails(trained: bool) -> None:
    policy = make_policy(beta=0.1) if trained else trained_from_new(config(8, beta=0.1))
    batch = make_batch()
    before = policy.logprobs(batch)
    impossible = replace(batch, input_ids_BL=batch.input_ids_BL + VOCAB)
    with pytest.raises(IndexError):
        policy.reference_logprobs(impossible)
    torch.testing.assert_close(policy.logprobs(batch), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in policy.parameters.values())
    assert policy.model.training


def test_a_frozen_part_of_the_adapter_stays_frozen() -> None:
    """PEFT makes a whole adapter trainable when it switches it on again."""
    model = peft_model(new=True)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    policy = make_policy(model=model, beta=0.1)
    policy.reference_logprobs(make_batch())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(policy.parameters)


def test_logprobs_have_no_dropout_and_leave_the_mode_as_it_was() -> None:
    policy = make_policy(model=peft_model(dropout=0.5))
    policy.model.train()
    first, second = policy.logprobs(make_batch()), policy.logprobs(make_batch())
    assert torch.equal(first, second)
    assert policy.model.training
    policy.model.eval()
    policy.update(make_batch())
    assert not policy.model.training


def test_prepare_scores_the_reference_only_for_a_kl() -> None:
    assert make_policy().prepare(make_batch()).ref_logp_BT is None
    prepared = make_policy(beta=0.1).prepare(make_batch())
    assert prepared.ref_logp_BT is not None
    assert prepared.entropy_BT is not None
    assert (prepared.entropy_BT[prepared.mask_BT] > 0).all()


# Gradients.


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(("level", "beta"), [("token", 0.0), ("token", 0.1), ("sequence", 0.0), ("sequence", 0.1)])
def test_cutting_into_micro_batches_changes_no_gradient(loss_type: str, level: str, beta: float) -> None:
    """Rows of 1 to 7 tokens: with a normaliser a micro-batch, the pieces would weigh otherwise."""
    changes = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "epsilon_high": 0.3}
    whole_policy = make_policy(**changes)
    batch = drifted_batch(whole_policy)
    whole, metrics = gradient(whole_policy, batch)
    assert any(tensor.abs().max() > 1e-3 for tensor in whole.values())
    for rows in (4, 2, 1):
        cut_policy = make_policy(rows, gradient_accumulation_steps=8 // rows, **changes)
        cut, cut_metrics = gradient(cut_policy, batch)
        assert_same(whole, cut)
        assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_rows_without_advantage_are_skipped_but_counted(loss_type: str) -> None:
    """The gradient is autograd's of the formula over all rows, those of advantage 0 in the normaliser."""
    policy = make_policy(loss_type=loss_type)
    batch = drifted_batch(policy)
    with counted_rows(policy) as rows:
        got, metrics = gradient(policy, batch)
    assert sum(rows) == 6
    policy.model.zero_grad()
    logp_BT, entropy_BT = policy.forward(batch, packed=False)
    size = Size(len(batch), int(batch.mask_BT.sum()))
    loss = policy.objective.value(logp_BT, batch, Totals(size, size, policy.config.max_completion_length))
    loss.backward()
    assert_same({name: p.grad for name, p in policy.parameters.items()}, got)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(entropy_BT[batch.mask_BT].mean().item(), rel=1e-5)


def test_with_a_kl_no_row_is_skipped() -> None:
    policy = make_policy(beta=0.1)
    batch = drifted_batch(policy)
    with counted_rows(policy) as rows:
        gradient(policy, batch)
    assert sum(rows) == 8


def test_order_of_rows_and_width_of_padding_change_no_gradient() -> None:
    policy = make_policy(2, gradient_accumulation_steps=4, beta=0.1)
    batch = drifted_batch(policy)
    straight, _ = gradient(policy, batch)
    turned, _ = gradient(policy, batch.select(torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])))
    assert_same(straight, turned)

    def wider(tensor: Tensor | None, left: int) -> Tensor | None:
        return None if tensor is None else torch.nn.functional.pad(tensor, (left, 3))

    widths = {"input_ids_BL": 5, "attention_mask_BL": 5}
    names = ("mask_BT", "sampler_logp_BT", "old_logp_BT", "entropy_BT", "ref_logp_BT")
    padded = replace(
        batch,
        **{name: wider(getattr(batch, name), left) for name, left in (widths | dict.fromkeys(names, 0)).items()},
    )
    assert_same(straight, gradient(policy, padded)[0])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_updates_of_one_rollout_share_its_gradient(loss_type: str) -> None:
    """Two optimizer batches a rollout: their gradients' mean is that of one batch of both, for all but bnpo.

    dapo's is exact because its normaliser is the rollout's, not the optimizer batch's.
    """
    one = make_policy(loss_type=loss_type)
    batch = drifted_batch(one)
    whole, _ = gradient(one, batch)
    two = make_policy(4, loss_type=loss_type, generation_batch_size=8, learning_rate=1e-12)
    steps: list[dict[str, Tensor]] = []
    two.optimizer.register_step_pre_hook(
        lambda *_: steps.append({name: p.grad.clone() for name, p in two.parameters.items()})
    )
    two.update(batch)
    assert len(steps) == 2
    assert_same(whole, {name: (steps[0][name] + steps[1][name]) / 2 for name in whole})


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain = make_policy()
    batch = drifted_batch(plain)
    assert_same(gradient(plain, batch)[0], gradient(make_policy(gradient_checkpointing=True), batch)[0])


def test_layers_that_share_an_input_keep_one() -> None:
    """PEFT made an fp32 copy for each, and autocast a bf16 one of that, which is what the backward keeps."""
    policy = make_policy(model=peft_model(dtype=torch.bfloat16))
    attention = policy.model.get_base_model().model.layers[0].self_attn
    inputs: list[Tensor] = []
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert layer.lora_A.default.weight.dtype == torch.float32
        layer.lora_A.default.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    gradient(policy, make_batch())
    assert {one.dtype for one in inputs} == {torch.bfloat16}
    assert len({id(one) for one in inputs}) * 3 == len(inputs)
    assert all(module.cast_input_dtype_enabled for module in policy.model.modules() if isinstance(module, LoraLayer))


def test_a_bf16_base_trains_an_fp32_adapter() -> None:
    """Its gradient points where the fp32 base's does; weights and optimizer state stay in fp32."""
    exact = make_policy()
    batch = make_batch()
    rounded = make_policy(model=peft_model(dtype=torch.bfloat16), learning_rate=1e-3)
    left, right = (torch.cat([g.flatten() for g in gradient(p, batch)[0].values()]) for p in (exact, rounded))
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.98
    assert {p.dtype for p in rounded.parameters.values()} == {torch.float32}
    assert rounded.logprobs(batch).dtype == torch.float32


# Updates.


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    policy = make_policy(max_grad_norm=1e-3)
    batch = make_batch()
    loose, metrics = gradient(make_policy(), batch)
    tight, clipped = gradient(policy, batch)
    norm = torch.cat([g.flatten() for g in loose.values()]).norm().item()
    assert norm > 1e-2
    assert metrics["grad_norm"] == clipped["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert torch.cat([g.flatten() for g in tight.values()]).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_steps_and_schedule_follow_passes_and_optimizer_batches() -> None:
    """2 passes over 2 optimizer batches, 3 rollouts in all: 12 updates, linear from 1e-2: the mean of 12, 11, 10, 9."""
    policy = make_policy(4, num_iterations=2, generation_batch_size=8, total_steps=3, learning_rate=1.2e-2, beta=0.1)
    taken = [0]
    policy.optimizer.register_step_post_hook(lambda *_: taken.__setitem__(0, taken[0] + 1))
    metrics = policy.update(make_batch())
    assert taken == [4]
    assert metrics["learning_rate"] == pytest.approx((12 + 11 + 10 + 9) / 4 * 1e-3)
    policy.update(make_batch())
    policy.update(make_batch())
    assert policy.scheduler.get_last_lr() == [0.0]


def test_ratios_are_taken_against_the_policy_before_the_first_pass() -> None:
    """With the ratio against the last update's policy, nothing would ever be clipped."""
    policy = make_policy(num_iterations=4, learning_rate=5e-2, lr_scheduler_type="constant")
    first = make_policy(learning_rate=5e-2).update(make_batch())
    assert first["clip_ratio/region_mean"] == 0
    assert policy.update(make_batch())["clip_ratio/region_mean"] > 0.02


def test_an_update_makes_rewarded_tokens_likelier() -> None:
    policy = make_policy(learning_rate=1e-2, lr_scheduler_type="constant")
    batch = make_batch(torch.tensor([1.0, -1.0] * 4), seed=3)
    before = policy.logprobs(batch)
    for _ in range(3):
        policy.update(batch)
    change_B = (policy.logprobs(batch) - before).sum(dim=1)
    assert change_B[::2].mean() > 0.1
    assert change_B[1::2].mean() < -0.1


def test_no_advantage_anywhere_is_a_step_without_a_forward() -> None:
    """Weights stay; the schedule goes on."""
    policy = make_policy(total_steps=2)
    batch = policy.prepare(make_batch(torch.zeros(8)))
    before = adapter_weights(policy.model)
    with counted_rows(policy) as rows:
        metrics = policy.update(batch)
    assert rows == []
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert policy.scheduler.get_last_lr() == [pytest.approx(0.5e-6)]
    assert all(torch.equal(before[name], after) for name, after in adapter_weights(policy.model).items())


def test_a_step_without_advantage_lets_momentum_run_on() -> None:
    """As it does where every row is computed: a gradient of zeros, not none, so Adam's first moment decays by 0.9."""
    policy = make_policy(learning_rate=1e-2)
    policy.update(make_batch())
    before = adapter_weights(policy.model)
    state = policy.optimizer.state[next(iter(policy.parameters.values()))]
    moment = state["exp_avg"].clone()
    policy.update(make_batch(torch.zeros(8)))
    torch.testing.assert_close(state["exp_avg"], 0.9 * moment)
    assert any((before[name] - after).abs().max() > 1e-3 for name, after in adapter_weights(policy.model).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.1, "loss_type": "grpo"},
        {"loss_type": "cispo", "vllm_importance_sampling_mode": "sequence_mask"},
        {"importance_sampling_level": "sequence"},
    ],
)
def test_one_update_takes_its_old_logprobs_from_its_own_forward(changes: dict[str, Any]) -> None:
    """The same step as on a prepared batch, each row computed once, and all of them seen by the judge before it."""
    seen: list[Batch] = []
    policy, prepared = make_policy(learning_rate=1e-2, **changes), make_policy(learning_rate=1e-2, **changes)
    policy.logprobs(make_batch())  # how the model finishes its logits is known from here on
    for _ in range(2):
        batch = make_batch()
        expected = prepared.update(prepared.prepare(batch))
        with counted_rows(policy) as rows:
            metrics = policy.update(batch, judge=seen.append)
        assert sum(rows) == len(batch) * (2 if policy.config.beta else 1)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert_same(adapter_weights(policy.model), adapter_weights(prepared.model), rtol=1e-4)
    first = make_policy(**changes).prepare(make_batch())
    torch.testing.assert_close(seen[0].old_logp_BT, first.old_logp_BT)
    torch.testing.assert_close(seen[0].entropy_BT, first.entropy_BT)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_the_judge_raises_is_no_step(dropout: float) -> None:
    """Also where something is dropped out, so that the old log-probs are a forward of their own."""
    policy = make_policy(model=peft_model(dropout=dropout), learning_rate=1e-2)
    policy.update(make_batch())
    before, moments = adapter_weights(policy.model), policy.optimizer.state_dict()["state"][0]["exp_avg"].clone()

    def refuse(batch: Batch) -> None:
        assert batch.old_logp_BT is not None
        raise DeliveryError("another policy")

    with counted_rows(policy) as rows, pytest.raises(DeliveryError, match="another policy"):
        policy.update(make_batch(), judge=refuse)
    assert sum(rows) == 8
    assert all(torch.equal(before[name], after) for name, after in adapter_weights(policy.model).items())
    assert torch.equal(policy.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert not any(p.grad is not None and p.grad.any() for p in policy.parameters.values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_no_step(where: str) -> None:
    """A ratio of e^200 with a negative advantage, and a gradient that overflows where the loss did not."""
    policy = make_policy(learning_rate=1e-2, vllm_importance_sampling_correction=False)
    policy.update(make_batch())
    prepared = policy.prepare(make_batch())
    assert prepared.old_logp_BT is not None
    bad = replace(prepared, old_logp_BT=prepared.old_logp_BT - 200)
    if where == "gradient":
        bad = prepared
        policy.parameters[next(iter(policy.parameters))].register_hook(lambda grad: grad * torch.inf)
    before = adapter_weights(policy.model)
    state = policy.optimizer.state_dict()["state"][0]
    moments = state["exp_avg"].clone()
    with pytest.raises(TrainingError, match="the step was not taken"):
        policy.update(bad)
    assert all(torch.equal(before[name], after) for name, after in adapter_weights(policy.model).items())
    assert torch.equal(moments, policy.optimizer.state_dict()["state"][0]["exp_avg"])
    assert all(parameter.grad is None for parameter in policy.parameters.values())


def test_training_goes_on_after_a_refused_step() -> None:
    policy, untouched = make_policy(learning_rate=1e-2), make_policy(learning_rate=1e-2)
    with pytest.raises(TrainingError):
        policy.update(make_batch(torch.full((8,), torch.nan)))
    policy.update(make_batch())
    untouched.update(make_batch())
    assert_same(adapter_weights(policy.model), adapter_weights(untouched.model))


# Construction.


def test_a_given_optimizer_is_used() -> None:
    """Also when accelerate wrapped it; the schedule is the policy's own, and steps once an update."""
    from accelerate import Accelerator

    model = peft_model()
    settings = config(8, learning_rate=3e-3, total_steps=10)
    optimizer = build_optimizer(model, settings)
    policy = Policy(model, settings, optimizer=Accelerator(cpu=True).prepare(optimizer))
    assert policy.optimizer is optimizer
    policy.update(make_batch())
    assert policy.scheduler.get_last_lr() == [pytest.approx(2.7e-3)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.7e-3)


@pytest.mark.parametrize(
    ("name", "after_3_of_4"), [("linear", 0.25), ("cosine", 0.146447), ("constant", 1.0), ("constant_with_warmup", 1.0)]
)
def test_schedules(name: str, after_3_of_4: float) -> None:
    """Linear is at 1/4 after 3 of 4 updates, cosine at (1 + cos(3 pi / 4)) / 2."""
    policy = Policy(peft_model(), config(8, lr_scheduler_type=name, learning_rate=1.0, total_steps=4))
    for _ in range(3):
        policy.optimizer.step()
        policy.scheduler.step()
    assert policy.scheduler.get_last_lr()[0] == pytest.approx(after_3_of_4, rel=1e-5)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        make_policy(model=base_model().requires_grad_(False))
    with pytest.raises(UnsupportedAdapter, match=r"lm_head.*not a LoRA weight"):
        make_policy(
            model=get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        )
    with pytest.raises(ConfigError, match=r"lora_A.*is torch.bfloat16"):
        make_policy(model=peft_model().bfloat16())
    with pytest.raises(ConfigError, match="float16 base"):
        make_policy(model=peft_model(dtype=torch.float16))
    stranger = torch.optim.AdamW(peft_model().parameters())
    with pytest.raises(ConfigError, match="optimizer does not hold"):
        Policy(peft_model(), config(8), optimizer=stranger)


def test_rows_that_make_no_whole_optimizer_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"8 rows are not a multiple of one optimizer batch.*= 6 rows"):
        make_policy(3, gradient_accumulation_steps=2).update(make_batch())


# Gradients that are missing.


def test_a_base_that_quantizes_its_activations_is_told_of_at_the_first_update() -> None:
    """W8A8 by compressed-tensors: what is rounded on its way gives no gradient back to the layers before."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = base_model()
    eight_bits = {"num_bits": 8, "symmetric": True}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**eight_bits, strategy="channel"),
        input_activations=quantization.QuantizationArgs(**eight_bits, strategy="token", dynamic=True),
    )
    frozen = quantization.QuantizationStatus.FROZEN
    settings = {"config_groups": {"all": scheme}, "quantization_status": frozen, "ignore": ["lm_head"]}
    quantization.apply_quantization_config(base, quantization.QuantizationConfig(**settings))
    for module in base.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(dim=1, keepdim=True) / 127)
    policy = make_policy(model=get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    before = adapter_weights(policy.model)
    with pytest.raises(
        UnsupportedAdapter, match=r"no gradient reaches B of 10 of 14 adapted layers.*layers\.0\..*q_proj"
    ):
        policy.update(make_batch())
    assert all(torch.equal(before[name], after) for name, after in adapter_weights(policy.model).items())


def test_a_gradient_that_is_cut_names_the_layers_that_get_none() -> None:
    """Of 14 adapted layers only the upper 7 were trained, and nothing said so."""
    model = peft_model(new=True)
    cut_below(model)
    policy = make_policy(model=model)
    before = adapter_weights(model)
    with pytest.raises(UnsupportedAdapter, match=r"no gradient reaches B of 7 of 14 adapted layers") as caught:
        policy.update(make_batch())
    assert str(caught.value).count("model.layers.0.") == 7
    assert "model.layers.1." not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_weights(model).items())


def test_a_signal_too_faint_for_fp32_refuses_no_layer() -> None:
    """Where importance weights vanish, Adam still moves B, and A's gradient behind it is 0."""
    policy = make_policy(model=peft_model(new=True))
    for _ in range(2):
        policy.update(make_batch(advantages=ADVANTAGES * 1e-25))
    assert policy.reach.watching


def test_an_a_is_asked_for_its_gradient_once_b_has_moved() -> None:
    """With B at 0 it has none; a learning rate that is 0 during the first step of a warm-up moves no B."""
    model = peft_model(new=True)
    policy = make_policy(model=model, warmup_steps=1, learning_rate=1e-2)
    policy.update(make_batch())
    assert policy.reach.watching
    policy.update(make_batch())
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (q_proj.lora_B["default"].weight != 0).any()
    hook = q_proj.lora_A["default"].register_forward_hook(lambda _, args, out: out.detach())
    with pytest.raises(UnsupportedAdapter, match=r"reaches A of 1 of 14 .*: model.layers.0.self_attn.q_proj\."):
        policy.update(make_batch())
    hook.remove()
    policy.update(make_batch())
    assert not policy.reach.watching
    assert not q_proj._forward_hooks


def test_a_layer_that_is_not_called_is_told_once() -> None:
    model = peft_model(new=True)
    attention = model.base_model.model.model.layers[0].self_attn
    layer = attention.q_proj

    class Past(torch.nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return layer.base_layer(values)

    spare = make_policy(model=model)
    attention.q_proj = Past()
    with pytest.warns(UserWarning, match=r"1 of 14 adapted layers are not called .*self_attn.q_proj;"):
        spare.update(make_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spare.update(make_batch())


def test_rows_without_a_signal_are_not_blamed_on_a_layer() -> None:
    """Nothing to learn, or one token that attends to one token: queries and keys then have no gradient."""
    policy = make_policy(model=peft_model(new=True))
    policy.update(make_batch(torch.zeros(8)))
    policy.update(make_batch(prompt_lengths=(1, 1), longest=1))
    assert policy.reach.watching
    policy.update(make_batch())
    policy.update(make_batch())
    assert not policy.reach.watching
