"""Tiny random-weight models of every family that is named in the table of models, with what each needs to be built.

Hidden size 64, two or three layers, real architectures of the installed transformers; weights loud, so that a log-prob
depends on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lora_grpo.config import ModelConfig
from lora_grpo.engines.local.targets import full_class
from lora_grpo.trainer.models import load_base
from tests.quantized import BLOCK, to_fp8, to_int4
from tests.tiny_models import HEAD_SIZE, SPECIAL_TOKENS, VOCAB, tiny_tokenizer

HIDDEN = 64
STD = 0.08
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HIDDEN // HEAD_SIZE,
    "num_key_value_heads": HIDDEN // HEAD_SIZE // 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
    "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
    "bos_token_id": None,
}
HEADED = {"head_dim": HEAD_SIZE}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
DELTA_NET = {
    **HEADED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
"""The CPU kernel of the gated delta net wants heads of 128, which is the configs' own size."""
MAMBA = {"mamba_d_state": 32, "mamba_d_head": 32, "mamba_n_heads": 4, "mamba_chunk_size": 64}
MLA = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
"""The CPU kernel of MLA is compiled for a latent of 512 and a rotary part of 64, the released models' own."""

MLA_LAYERS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


@dataclass(frozen=True)
class Family:
    """A family's config beyond the common one, what is adapted, and what vLLM is started with."""

    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    targets: str | tuple[str, ...] = "all-linear"
    engine: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    """Of a multimodal wrapper: its tower's config; `fields` and the common ones are then its language model's."""
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path], Path] | None = None
    """Brings the plain checkpoint into fewer bits."""
    quantization: Literal["nf4"] | None = None
    """What is asked of trainer and engine instead."""

    @property
    def layers(self) -> str:
        """What is adapted, in words."""
        return self.targets if isinstance(self.targets, str) else ", ".join(self.targets)


QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
BLOCKS = {"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "num_attention_heads": 4, "num_key_value_heads": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

FAMILIES: dict[str, Family] = {
    # Served by classes of vLLM's own.
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", HEADED),
    "llama": Family("llama"),
    "mistral": Family("mistral", {**HEADED, "sliding_window": None}),
    "phi3": Family("phi3"),
    "granite": Family(
        "granite",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 1 / HEAD_SIZE,
        },
    ),
    "cohere": Family("cohere", {"logit_scale": 0.0625, "tie_word_embeddings": True}),
    "cohere2": Family("cohere2", {**HEADED, "logit_scale": 0.0625, "sliding_window": 32, "tie_word_embeddings": True}),
    # PEFT adapts no out_proj of a Mamba layer.
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **MAMBA,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 2 * HIDDEN,
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 8.0,
            "position_embedding_type": "rope",
        },
        (*ATTENTION, "in_proj", "input_linear", "output_linear"),
    ),
    "glm4": Family("glm4", HEADED),
    "qwen3_5_text": Family("qwen3_5_text", DELTA_NET),
    "nemotron_h": Family(
        "nemotron_h",
        {
            **HEADED,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "ssm_state_size": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 64,
        },
        (*ATTENTION, "in_proj", "up_proj", "down_proj"),
    ),
    "lfm2": Family(
        "lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "block_dim": HIDDEN,
            "block_ff_dim": 2 * HIDDEN,
            "conv_dim": HIDDEN,
            "conv_L_cache": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama4": Family(
        "llama4_text",
        {
            **HEADED,
            "intermediate_size_mlp": 2 * HIDDEN,
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 256,
        },
        ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    # Mixtures of experts, LoRA outside the experts. PEFT takes the name of a shared expert's layer for the experts'.
    "qwen3_moe": Family("qwen3_moe", {**HEADED, **EXPERTS, "num_experts": 4}, ATTENTION),
    "mixtral": Family("mixtral", {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}, ATTENTION),
    "glm4_moe": Family(
        "glm4_moe",
        {
            **HEADED,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
        ATTENTION,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        {**DELTA_NET, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": HIDDEN},
        (*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"),
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {
            **HEADED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
        },
        ATTENTION,
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        {
            **MLA,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        MLA_LAYERS,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **MLA,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_mtp_layers": 0,
        },
        MLA_LAYERS,
    ),
    # Served by vLLM's Transformers backend.
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": Family("starcoder2"),
    "phi": Family("phi"),
    "glm": Family("glm", HEADED),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", HEADED),
    "seed_oss": Family("seed_oss", HEADED),
    "arcee": Family("arcee", HEADED),
    "gpt_neox": Family("gpt_neox", {"num_key_value_heads": HIDDEN // HEAD_SIZE}),
    # Multimodal wrappers, of which the language model is trained.
    "qwen3_5": Family(
        "qwen3_5",
        DELTA_NET,
        vision=QWEN_TOWER,
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {**HEADED, "rope_parameters": MROPE},
        vision={**QWEN_TOWER, "deepstack_visual_indexes": [0]},
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        {"rope_parameters": MROPE},
        vision={"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": HIDDEN},
    ),
    "gemma3": Family(
        "gemma3",
        {
            **HEADED,
            "query_pre_attn_scalar": HEAD_SIZE,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        wrapper={"mm_tokens_per_image": 4, "tie_word_embeddings": True},
    ),
    "gemma4": Family(
        "gemma4",
        {
            **HEADED,
            "global_head_dim": HEAD_SIZE,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 14,
        },
        wrapper={"tie_word_embeddings": True},
    ),
    "mistral3": Family(
        "mistral3",
        {**HEADED, "model_type": "mistral", "sliding_window": None},
        vision={
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        wrapper={"tie_word_embeddings": False},
    ),
    # Bases in fewer bits.
    "llama in nf4": Family("llama", quantization="nf4"),
    "llama in fp8 blocks": Family("llama", BLOCKS, rewrite=to_fp8),
    "llama in W4A16": Family("llama", rewrite=to_int4),
    # vLLM serves no LoRA for these.
    "stablelm": Family("stablelm"),
    "falcon": Family("falcon", {"new_decoder_architecture": True, "bias": False}),
    "gpt2": Family("gpt2", {"n_embd": HIDDEN, "n_head": 2, "n_layer": 2, "n_positions": 512}),
}


def build(name: str, directory: Path, *, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write the tiny model of a family and a tokenizer to `directory`; returns the directory."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _class_of(family).from_config(_config(family))
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory if family.rewrite is None else family.rewrite(directory)


def trainer_model(name: str, directory: Path, dtype: str = "float32") -> PreTrainedModel:
    """The model of a family's directory as its trainer holds it."""
    asked = ModelConfig(name=str(directory), dtype=dtype, quantization=FAMILIES[name].quantization)
    return load_base(asked, torch.device("cpu")).eval()  # type: ignore[no-any-return]


def full_model(directory: Path) -> PreTrainedModel:
    """All that the checkpoint in `directory` holds, in float32, as anyone would load it."""
    wrapper = full_class(AutoConfig.from_pretrained(directory)) is not None
    whole = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    return whole.from_pretrained(directory, dtype="float32").eval()  # type: ignore[no-any-return]


def _class_of(family: Family) -> Any:
    return AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText


def _config(family: Family) -> Any:
    fields = {**COMMON, **family.fields}
    if family.vision is None:
        return AutoConfig.for_model(family.model_type, **fields)
    config = AutoConfig.for_model(
        family.model_type, text_config=fields, vision_config=dict(family.vision), **family.wrapper
    )
    for number, kind in enumerate(("image", "video", "audio"), start=1):
        for token in (f"{kind}_token_id", f"{kind}_token_index"):
            if hasattr(config, token):
                setattr(config, token, VOCAB - number)
    # The other ids of a real vocabulary lie beyond this one.
    for token in ("vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index"):
        if hasattr(config, token):
            setattr(config, token, VOCAB)
    return config


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Loud weights; what state-space layers start from (A, D, the step's bias) stays."""
    generator = torch.Generator().manual_seed(seed)
    rows = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        values = torch.randn(parameter.shape, generator=generator)
        if leaf in ("A_log", "D", "dt_bias"):
            continue
        if id(parameter) in rows:
            parameter.copy_(0.25 * values)
        elif parameter.ndim > 1:
            parameter.copy_(STD * values)
        else:
            parameter.add_(0.2 * values)
