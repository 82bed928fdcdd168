"""The output layer by chunks gives what whole logits give, for every way that models finish them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.grpo import head
from lora_grpo.grpo.head import completion_scores, token_logprobs

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
FINISHES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "bias": ("phi", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "cap": ("gemma2", {"final_logit_softcapping": 5.0}),
    "divided": ("granite", {"logits_scaling": 8.0}),
    "multiplied": ("cohere", {"logit_scale": 0.25}),
}
T = 6


def peft_model(kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    name, settings = FINISHES[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    peft = get_peft_model(model, LoraConfig(r=4, **{"target_modules": "all-linear", **lora}))
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return peft.eval()


def rows() -> tuple[dict[str, Any], Tensor, Tensor]:
    """Three rows of a prompt and up to T tokens."""
    ids_BL = torch.randint(1, VOCABULARY, (3, 4 + T), generator=torch.Generator().manual_seed(1))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, 7:] = 0
    mask_BL[2, :3] = 0
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "logits_to_keep": T + 1, "use_cache": False}
    return inputs, ids_BL[:, -T:], mask_BL[:, -T:].bool()


def learned(model: Any, scores: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """logp, entropy, and the adapter's gradient of a loss with other weights for every token."""
    logp_BT, entropy_BT = scores(model, inputs)
    (logp_BT * torch.linspace(-1, 2, logp_BT.numel()).view_as(logp_BT)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logp_BT.detach(), entropy_BT.detach(), gradients


def fused(temperature: float, *targets: Tensor) -> Any:
    return lambda model, inputs: completion_scores(model, inputs, *(targets or rows()[1:]), temperature)


def whole(temperature: float, *targets: Tensor) -> Any:
    def scores(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        ids_BT, wanted_BT = targets or rows()[1:]
        logits_BTV = model(**inputs).logits[:, -T - 1 : -1]
        return tuple(part.where(wanted_BT, 0.0) for part in token_logprobs(logits_BTV, ids_BT, temperature))

    return scores


class Largest(TorchDispatchMode):
    """The most memory of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("kind", FINISHES)
@pytest.mark.parametrize("block", [(1, 1), (5, 20), (1000, 1000)])
def test_a_head_by_blocks_is_the_whole_one(kind: str, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._BLOCK, "cpu", block)
    inputs = rows()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logp_BT, entropy_BT, gradients = learned(peft_model(kind), fused(0.7), inputs)
    expected_logp_BT, expected_entropy_BT, expected = learned(peft_model(kind), whole(0.7), inputs)
    assert logp_BT.abs().max() > 1
    torch.testing.assert_close(logp_BT, expected_logp_BT, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(entropy_BT, expected_entropy_BT, rtol=2e-5, atol=2e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", FINISHES)
def test_bf16_is_no_further_from_fp32_than_whole_logits_are(kind: str) -> None:
    inputs = rows()[0]
    exact = learned(peft_model(kind).to(torch.float64).float(), whole(1.0), inputs)
    distances = []
    for scores in (fused(1.0), whole(1.0)):
        model = peft_model(kind)
        model.base_model.model.to(torch.bfloat16)
        logp_BT, _, gradients = learned(model, scores, inputs)
        apart = sum(float((gradients[name].float() - g).square().sum()) for name, g in exact[2].items())
        distances.append((float((logp_BT - exact[0]).abs().mean()), apart**0.5))
    (logp, gradient), (whole_logp, whole_gradient) = distances
    assert logp <= 1.2 * whole_logp
    assert gradient <= 1.2 * whole_gradient


class Products(TorchDispatchMode):
    """The precisions of products that take as many rows as tokens are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default and args[0].shape[0] == int(rows()[2].sum()):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_a_cpu_without_bf16_products_makes_none_in_either_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, as a policy calls it: the product of the way back took a hundred times as long."""
    monkeypatch.setattr(head, "_CPU_HAS_BF16", False)
    model, inputs = peft_model("plain"), rows()[0]
    model.base_model.model.to(torch.bfloat16)
    with Products() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        learned(model, fused(1.0), inputs)
    assert seen.dtypes == {torch.float32}


def test_no_whole_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward."""
    monkeypatch.setitem(head._BLOCK, "cpu", (4, VOCABULARY))
    model, inputs = peft_model("plain"), rows()[0]
    completion_scores(model, inputs, *rows()[1:], 1.0)
    inputs = {name: value.repeat(20, 1) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids_BT, wanted_BT = (part.repeat(20, 1) for part in rows()[1:])
    logits_bytes = 4 * int(wanted_BT.sum()) * VOCABULARY
    for scores, makes_them in ((fused, False), (whole, True)):
        with Largest() as seen:
            learned(model, scores(1.0, ids_BT, wanted_BT), inputs)
        assert (seen.bytes >= logits_bytes) == makes_them


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_a_trained_output_layer_keeps_its_gradient(lora: dict[str, Any]) -> None:
    inputs = rows()[0]
    got = learned(peft_model("plain", **lora), fused(1.0), inputs)
    expected = learned(peft_model("plain", **lora), whole(1.0), inputs)
    assert any("lm_head" in name for name in got[2])
    assert all(torch.equal(got[2][name], gradient) for name, gradient in expected[2].items())


def test_an_unknown_finish_is_told_and_computed_as_the_model_does() -> None:
    model, inputs = peft_model("plain"), rows()[0]
    model.get_base_model().register_forward_hook(lambda _, __, out: out.__setitem__("logits", out.logits.sin() * 3))
    with pytest.warns(UserWarning, match="makes all logits at once"):
        got = learned(model, fused(1.0), inputs)
    expected = learned(model, whole(1.0), inputs)
    assert torch.equal(got[0], expected[0])


def test_a_token_that_cannot_come_has_no_part_in_the_entropy() -> None:
    model, inputs = peft_model("bias"), rows()[0]
    with torch.no_grad():
        model.get_output_embeddings().bias[7:20] = -torch.inf
    _, ids_BT, wanted_BT = rows()
    ids_BT = torch.where((ids_BT >= 7) & (ids_BT < 20), 3, ids_BT)
    logp_BT, entropy_BT = completion_scores(model, inputs, ids_BT, wanted_BT, 1.0)
    assert logp_BT.isfinite().all()
    assert entropy_BT.isfinite().all()
    assert entropy_BT[wanted_BT].min() > 0


def test_a_model_compiled_in_place_gives_whole_logits() -> None:
    model = peft_model("plain")
    model.get_base_model().compile(backend="eager")
    assert head._fused(model, {}) is None


def test_a_layer_that_computes_otherwise_is_told_and_called_as_it_stands() -> None:
    """As a quantized one: its weights are no rows of a product."""

    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model, inputs = peft_model("plain"), rows()[0]
    model.get_output_embeddings().__class__ = Doubled
    with pytest.warns(UserWarning, match="Doubled makes all logits at once.*: it is not a plain linear layer"):
        got = learned(model, fused(1.0), inputs)
    assert torch.equal(got[0], learned(model, whole(1.0), inputs)[0])
