"""Real architectures with small random weights, for tests that need a model but no knowledge.

Weights are scaled so that activations stay of order one through the layers and next-token distributions are far from
uniform: a log-prob then depends on every weight, and a wrong adapter shows. Each model loads in Transformers and vLLM.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HEAD_SIZE = 32
"""The smallest that vLLM's CPU attention supports."""

SLIDING_WINDOW = 32
LOGIT_STD = 2.0
# Transformers gives a Qwen2 directory a tokenizer class that adds <|endoftext|> where it is not in the vocabulary.
SPECIAL_TOKENS = ("<|endoftext|>", "<eos>", "<|im_start|>", "<|im_end|>")
VOCAB = len(SPECIAL_TOKENS) + 256

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

GEMMA_SCALAR = {"query_pre_attn_scalar": HEAD_SIZE, "sliding_window": SLIDING_WINDOW}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": HEAD_SIZE},
    "llama": {},
    "mistral": {"head_dim": HEAD_SIZE, "sliding_window": None},
    "gemma": {"head_dim": HEAD_SIZE},
    "gemma2": {"head_dim": HEAD_SIZE, **GEMMA_SCALAR},
    "gemma3_text": {"head_dim": HEAD_SIZE, **GEMMA_SCALAR, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Transformers' model types, with what their configs need beyond the common shape."""


def tiny_model(
    arch: str,
    directory: Path | str,
    *,
    dtype: str = "bfloat16",
    tie: bool | None = None,
    seed: int = 0,
    vocab: int = VOCAB,
    hidden: int = 64,
) -> Path:
    """Write a two-layer model of `arch` and its tokenizer to `directory`; returns the directory.

    `tie` says whether the output layer is the embedding; by default as the architecture has it (only Gemma ties).
    `vocab` may exceed the tokenizer's `VOCAB` tokens, as with released models that pad their embedding.
    """
    directory = Path(directory)
    if vocab < VOCAB or hidden % (2 * HEAD_SIZE):
        raise ValueError(f"{vocab=} must be at least {VOCAB}, and {hidden=} a multiple of {2 * HEAD_SIZE}")
    if arch == "gemma2" and tie is False:
        raise ValueError("vLLM's Gemma 2 reads its output layer from the embedding, whatever the config says")
    config = AutoConfig.for_model(
        arch,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE // 2,
        max_position_embeddings=512,
        tie_word_embeddings=arch.startswith("gemma") if tie is None else tie,
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        bos_token_id=None,
        **ARCHITECTURES[arch],
    )
    model = AutoModelForCausalLM.from_config(config)
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def load_model(directory: Path | str, dtype: str = "float32") -> PreTrainedModel:
    """The model of a directory as a trainer holds it: in `dtype`, without dropout."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text encodes and comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_lora(
    model: PreTrainedModel,
    *,
    r: int = 8,
    targets: str = "all-linear",
    scale: float = 0.1,
    seed: int = 0,
    **settings: Any,
) -> PeftModel:
    """Wrap `model` with a LoRA adapter in fp32 whose B is normal with standard deviation `scale`, not zero.

    `targets` is "all-linear", "attention" or what `peft.LoraConfig` takes; `settings` are further fields of it.
    """
    names = list(ATTENTION) if targets == "attention" else targets
    config = LoraConfig(r=r, target_modules=names, **{"lora_alpha": 2 * r, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    refill_lora(peft_model, scale=scale, seed=seed)
    return peft_model.eval()


@torch.no_grad()
def refill_lora(peft_model: PeftModel, *, scale: float = 0.1, seed: int = 0) -> None:
    """Give every B new normal values, as a training step would give new ones; A stays."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    final_norm = model.base_model.norm.weight
    logit_scale = LOGIT_STD / math.sqrt(model.config.hidden_size)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            # Gains lie around 1, which Gemma's norms write as 0; biases around 0.
            offset = 1.0 - float(parameter[0]) if "norm" in name else 0.0
            around = parameter + offset + 0.2 * values
            # With random signs in the final norm a tied output layer does not just repeat the input token.
            signed = around * values.sign() if parameter is final_norm else around
            parameter.copy_(signed - offset)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.copy_(logit_scale * values)
        else:
            parameter.copy_(values / math.sqrt(parameter.shape[1]))
