"""What vLLM would not serve as the trainer computes it is refused before training, with the value and the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lora_grpo.adapters.peft_form.checks import active_adapter, check_rank, check_same_dtype, check_servable
from lora_grpo.adapters.peft_form.modules import lora_modules
from lora_grpo.errors import UnsupportedAdapter

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def base(model_type: str = "llama", **fields: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **fields}))


def adapted(model: nn.Module | None = None, **fields: Any) -> PeftModel:
    """`model` (default: a tiny Llama) with a LoRA on two projections, or as `fields` say."""
    defaults = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model or base(), LoraConfig(**{**defaults, **fields}))


def check(model: nn.Module) -> None:
    check_servable(model, active_adapter(model))


def several_active() -> PeftModel:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> PeftModel:
    model = adapted()
    model.merge_adapter()
    return model


def norm_trains() -> PeftModel:
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


def second_adapter_trains() -> PeftModel:
    """A second adapter that is not active, and would be trained all the same."""
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def frozen(model: PeftModel) -> PeftModel:
    return model.requires_grad_(False)


def convolution() -> PeftModel:
    model = base()
    model.model.convolution = nn.Conv1d(32, 32, 3)
    return adapted(model, target_modules=["q_proj", "convolution"])


def gpt2() -> PeftModel:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    return adapted(AutoModelForCausalLM.from_config(config), target_modules=["c_attn"], fan_in_fan_out=True)


def quantized() -> PeftModel:
    model = base()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return adapted(model)


def a_tower_too() -> PeftModel:
    text = AutoConfig.for_model("llama", **TINY)
    vision = AutoConfig.for_model(
        "clip_vision_model",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=5)
    model = AutoModelForImageTextToText.from_config(config)
    return adapted(model, target_modules=["q_proj"], task_type=None)


def other_rank_than_configured() -> PeftModel:
    model = adapted()
    layer = lora_modules(model, "default")[0].layer
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)
    return model


def prompt_tuning() -> PeftModel:
    """Of a model that has no `.model`, as the inside of a LoRA model has."""
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = AutoModelForCausalLM.from_config(config)
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def mixture(model_type: str) -> PreTrainedModel:
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    return base(model_type, num_experts=4, num_local_experts=4, **sizes)


def attention(model_type: str) -> Callable[[], PeftModel]:
    return lambda: adapted(mixture(model_type), target_modules=["q_proj", "v_proj"])


def latent_attention() -> PeftModel:
    model = base("deepseek_v3", first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8, num_key_value_heads=2)
    return adapted(model, target_modules=["o_proj", "kv_b_proj"])


def reordered() -> PeftModel:
    model = base("llama4_text", moe_layers=[], intermediate_size_mlp=64, head_dim=16)
    return adapted(model, target_modules=["v_proj", "k_proj"])


def experts() -> PeftModel:
    """Experts that are modules, as code of a checkpoint's own may have them."""
    model = base()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    return adapted(model, target_modules=r".*(q_proj|experts\.0)")


def shared_expert() -> PeftModel:
    """The expert that every token goes through is a layer like any other."""
    return adapted(mixture("qwen2_moe"), target_modules=["q_proj", "up_proj"])


def disabled() -> PeftModel:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no adapter": (base, r"LlamaForCausalLM holds no PEFT adapter; wrap it with peft\.get_peft_model"),
    "DoRA": (lambda: adapted(use_dora=True), r"use_dora=True: .*; set use_dora=False"),
    "LoRA bias": (lambda: adapted(base(mlp_bias=True, attention_bias=True), lora_bias=True), "lora_bias=True: .*False"),
    "bias": (lambda: adapted(bias="all"), "bias='all': .*; set bias='none'"),
    "own bias": (lambda: adapted(bias="lora_only"), "bias='lora_only'"),
    "whole modules": (lambda: adapted(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]: .*leave it None"),
    "head": (lambda: adapted(target_modules=["q_proj", "lm_head"]), "^lm_head: .*leave it out of target_modules"),
    "embedding": (
        lambda: adapted(target_modules=["q_proj", "embed_tokens"]),
        r"^model\.embed_tokens: .*leave it out of target_modules",
    ),
    "frozen embedding": (
        lambda: frozen(adapted(target_modules=["q_proj", "embed_tokens"])),
        r"^model\.embed_tokens: .*leave it out of target_modules",
    ),
    "parameters": (
        lambda: adapted(target_parameters=["mlp.down_proj.weight"], target_modules=["q_proj"]),
        r"target_parameters=\['mlp\.down_proj\.weight'\]: .*target_modules=\['k_proj'",
    ),
    "token deltas": (lambda: adapted(trainable_token_indices=[1, 2]), r"trainable_token_indices=\[1, 2\]: .*None"),
    "replicated layers": (lambda: adapted(layer_replication=[(0, 2), (1, 2)]), "layer_replication=.*leave it None"),
    "activated LoRA": (lambda: adapted(alora_invocation_tokens=[3]), r"alora_invocation_tokens=\[3\]: .*None"),
    "prompt tuning": (prompt_tuning, "is a PromptTuningConfig; vLLM swaps only LoRA: use peft.LoraConfig"),
    "PiSSA": (lambda: adapted(init_lora_weights="pissa"), "init_lora_weights='pissa' changes .* base.*use True"),
    "fast PiSSA": (lambda: adapted(init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'"),
    "OLoRA": (lambda: adapted(init_lora_weights="olora"), "init_lora_weights='olora' changes .* base weights"),
    "several active": (several_active, r"active adapters \['default', 'second'\]: only one.*set_adapter"),
    "merged": (merged, r"q_proj is merged into the base: call model\.unmerge_adapter"),
    "disabled": (disabled, r"q_proj has its adapter disabled: .*enable_adapter_layers\(\)"),
    "a norm trains": (norm_trains, r"model\.norm\.weight \(and 0 more\) would be trained .*freeze it"),
    "another adapter trains": (second_adapter_trains, r"lora_A\.second\.weight \(and 3 more\) would be trained"),
    "convolution": (convolution, r"model\.convolution is a Conv1d; only torch\.nn\.Linear.*leave it out"),
    "GPT-2": (gpt2, "c_attn is a Conv1D; only torch"),
    "quantized": (quantized, "the base is quantized by bitsandbytes: bnb_4bit_quant_type=None.*take the unquantized"),
    "a tower too": (
        a_tower_too,
        r"vision_tower\..*q_proj \(and \d+ more\) is outside .*r'model\\\.language_model\\\.\.\*\\\.\(q_proj\)'",
    ),
    "experts": (
        experts,
        r"model\.layers\.0\.mlp\.experts\.0: LoRA on a mixture's experts cannot be proven yet; name layers beside",
    ),
    "latent attention": (latent_attention, r"layers\.0\.self_attn\.kv_b_proj: vLLM folds .*decodes without its LoRA"),
    "reordered rows": (reordered, r"self_attn\.k_proj: vLLM reorders the rows .*leave both out of target_modules"),
    "a mixture's all-linear": (
        lambda: adapted(mixture("mixtral"), target_modules="all-linear"),
        r"target_parameters=.*LoRA on a mixture's experts cannot be proven yet; .*target_modules=\['k_proj', 'o_proj',",
    ),
    "other rank": (
        other_rank_than_configured,
        r"q_proj: A and B have shapes \(\(2, 32\), \(32, 2\)\) where rank 4 .* needs \(\(4, 32\), \(32, 4\)\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_value_and_the_fix(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(UnsupportedAdapter, match=message):
        check(make())


@pytest.mark.parametrize(("own", "engine"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_two_dtypes_that_do_not_hold_each_others_values_are_told(own: str, engine: str) -> None:
    """Every tensor of the base would differ, and no checkpoint would be the cause."""
    model = adapted(base().to(getattr(torch, own)))
    with pytest.raises(UnsupportedAdapter, match=f"base is {own} and the engine's {engine}.*dtype='{own}'"):
        check_same_dtype(model, engine)
    for fine in (own, "float32"):
        check_same_dtype(model, fine)
        check_same_dtype(adapted(base().float()), fine)


def test_a_base_quantized_on_loading_is_refused() -> None:
    """LoftQ and initialisations like it need packages that are not there; their name in the config is enough."""
    model = adapted()
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(UnsupportedAdapter, match="init_lora_weights='loftq' changes the trainer's base weights"):
        check(model)


def test_lora_variants_are_refused_whatever_asks_for_them() -> None:
    """Block-diagonal LoRA: its A and B look like plain ones, and are multiplied otherwise."""
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    with pytest.raises(UnsupportedAdapter, match=r"q_proj computes BdLora\w+, vLLM only plain LoRA"):
        check(adapted(use_bdlora=blocks))


def test_rank_above_the_engines() -> None:
    modules = check_servable(adapted(r=4, rank_pattern={"layers.1.mlp.down_proj": 24}), "default")
    check_rank(modules, 32)
    with pytest.raises(
        UnsupportedAdapter,
        match=r"model\.layers\.1\.mlp\.down_proj has rank 24, the engine takes at most 16; .*max_lora_rank=24",
    ):
        check_rank(modules, 16)


def inactive_beside() -> PeftModel:
    model = adapted()
    model.add_adapter("policy", LoraConfig(r=8, target_modules=["v_proj"]))
    model.set_adapter("policy")
    return model


def unmerged() -> PeftModel:
    model = merged()
    model.unmerge_adapter()
    return model


SOUND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (adapted, 4),
    "all-linear": (lambda: adapted(target_modules="all-linear"), 14),
    "rsLoRA": (lambda: adapted(use_rslora=True, lora_alpha=64), 4),
    "patterns": (lambda: adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 1}), 4),
    "dropout": (lambda: adapted(lora_dropout=0.1).train(), 4),
    "gaussian": (lambda: adapted(init_lora_weights="gaussian"), 4),
    "orthogonal": (lambda: adapted(init_lora_weights="orthogonal"), 4),
    "some layers": (lambda: adapted(layers_to_transform=[1]), 2),
    "biased base": (lambda: adapted(base("qwen2")), 4),
    "one expert is dense": (lambda: adapted(base(num_local_experts=1)), 4),
    "a mixture's attention": (attention("mixtral"), 4),
    "a mixture's shared expert": (shared_expert, 4),
    "inactive adapter beside": (inactive_beside, 2),
    "unmerged": (unmerged, 4),
    "frozen": (lambda: frozen(adapted()), 4),
    "compiled": (lambda: torch.compile(adapted()), 4),
    "half precision": (lambda: adapted(base().to(torch.bfloat16)), 4),
}


@pytest.mark.parametrize("what", SOUND)
def test_sound_adapters_pass(what: str) -> None:
    make, modules = SOUND[what]
    model = make()
    assert len(check_servable(model, active_adapter(model))) == modules
