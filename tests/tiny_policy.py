"""A tiny Llama with a LoRA adapter that does something, and rollouts for it, for tests of the algorithm."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.policy import Policy
from lora_grpo.types import Completion, Group

VOCAB = 64
PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small, threads do nothing but wait for each other: on a busy machine, for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def peft_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.0, *, new: bool = False
) -> PeftModel:
    """The same weights for the same seed; B is random, so that the adapter changes the model, unless it is `new`."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(base_model(seed, dtype), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not new:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def trained_from_new(config: GRPOConfig) -> Policy:
    """A policy whose adapter is `peft_model`'s, and was new when it was built: its reference is the base."""
    policy = Policy(peft_model(new=True), config)
    policy.model.load_state_dict(peft_model().state_dict())
    return policy


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def rollout(
    prompt_lengths: Sequence[int] = (3, 5), generations: int = 4, longest: int = 7, seed: int = 0, truncated: int = 0
) -> list[Group]:
    """Random tokens, 1 to `longest` a completion; every `truncated`-th one was cut."""
    draw = random.Random(seed)
    count = iter(range(1, 1 + len(prompt_lengths) * generations))

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCAB) for _ in range(length))

    def completion() -> Completion:
        ids = tokens(draw.randint(1, longest))
        cut = bool(truncated) and next(count) % truncated == 0
        ids = ids if cut else (*ids[:-1], EOS)
        logprobs = tuple(-draw.uniform(1.0, 6.0) for _ in ids)
        return Completion("", ids, logprobs, "length" if cut else "stop", version=1)

    return [Group("", tokens(length), tuple(completion() for _ in range(generations))) for length in prompt_lengths]


def config(rows: int, **changes: Any) -> GRPOConfig:
    """Micro-batches of `rows` rows, one an update; groups of 4; no clipping of the gradient."""
    update = rows * changes.get("gradient_accumulation_steps", 1)
    plain = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "generation_batch_size": None if update % 4 == 0 else math.lcm(update, 4),
        "num_generations": 4,
        "max_completion_length": 10,
        "max_grad_norm": 0.0,
    }
    return GRPOConfig(**{**plain, **changes})


def drifted(batch: Batch, logp_BT: Tensor, spread: float = 0.4, seed: int = 0) -> Batch:
    """`batch` as if sampled by other policies: old, sampler and reference log-probs `spread` nats around `logp_BT`."""
    noise = torch.Generator().manual_seed(seed)
    mask_BT = batch.completion_mask_BT

    def near() -> Tensor:
        return (logp_BT + spread * torch.randn(logp_BT.shape, generator=noise)).where(mask_BT, 0.0)

    old_logp_BT, ref_logp_BT, sampler_logp_BT = near(), near(), near()
    return replace(batch, old_logp_BT=old_logp_BT, ref_logp_BT=ref_logp_BT, sampler_logp_BT=sampler_logp_BT)


def gradient(policy: Policy, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient that an update on `batch` steps along, by parameter, and the metrics; weights stay as they are."""
    caught: dict[str, Tensor] = {}

    def catch(*_: Any) -> None:
        caught.update({name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None})

    still = torch.optim.SGD(policy.parameters.values(), lr=0.0)
    still.register_step_pre_hook(catch)
    kind, warmup = policy.config.lr_scheduler_type, policy.config.warmup_steps
    policy.optimizer, policy.scheduler = still, get_scheduler(kind, still, warmup, num_training_steps=100)
    metrics = policy.update(batch)
    return caught, metrics


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Equal to fp32 rounding: against the largest entry, for a sum's small entries carry its large ones' rounding."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=rtol, atol=rtol * float(tensor.abs().max()), msg=name)


class Cut(torch.autograd.Function):
    """A layer's output whose way back is cut, as `torch.round` in a quantized layer cuts it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient)


def cut_below(model: Any) -> None:
    """Nothing comes back through the second layer's input."""
    layer = model.base_model.model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: (Cut.apply(args[0]), *args[1:]))
