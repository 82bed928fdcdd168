"""Models with the shapes of released ones and random weights: a sync costs the same whatever the values.

Weights are scaled so that activations stay of order one and next-token distributions are far from uniform: a log-prob
then depends on every weight, and a wrong policy shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.errors import ConfigError
from lora_grpo.sections import nearest_key

if TYPE_CHECKING:
    import torch

_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_parameters": _QWEN_ROPE}
_LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
_LLAMA_ROPE |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)


def _shape(*values: Any, **more: Any) -> dict[str, Any]:
    return {**dict(zip(_FIELDS, values, strict=True)), **more}


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape("qwen2", 128, 512, 4, 4, 2, 1024, False, **_QWEN | {"max_position_embeddings": 1024}),
    "tiny-tied": _shape("qwen2", 128, 512, 2, 4, 2, 1024, True, **_QWEN | {"max_position_embeddings": 1024}),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, True, **_QWEN),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, 151936, True, **_QWEN),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False, **_QWEN),
    "llama-3.1-8b": _shape(
        "llama", 4096, 14336, 32, 32, 8, 128256, False,
        rms_norm_eps=1e-5, max_position_embeddings=131072, rope_parameters=_LLAMA_ROPE,
    ),
}  # fmt: skip
"""Fields of the released models' configs."""

LOGIT_STD = 2.0


def shape_config(name: str) -> dict[str, Any]:
    """The config of a shape. Raises `ConfigError` naming the nearest shape."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; {nearest_key(name, SHAPES)}")
    return SHAPES[name]


def write_model(name: str, directory: Path, *, device: str = "cpu", seed: int = 0) -> Path:
    """Write a shape's config, random bf16 weights and a tokenizer to `directory`, unless that is there; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_grpo.trainer.checking import byte_tokenizer

    fields = shape_config(name)
    if directory.exists():
        return directory
    config = AutoConfig.for_model(bos_token_id=None, eos_token_id=0, pad_token_id=0, **fields)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device).tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    # What belongs to no layer is drawn first, as it was in every result so far.
    for parameter_name, parameter in sorted(model.named_parameters(), key=lambda named: ".layers." in named[0]):
        parameter.data = _values(parameter_name, parameter.shape, config.hidden_size, generator)
    unfinished = directory.with_name(f".{directory.name}")
    model.save_pretrained(unfinished, max_shard_size="2GB")
    byte_tokenizer().save_pretrained(unfinished)
    return unfinished.rename(directory)


def _values(name: str, shape: torch.Size, hidden: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    values = torch.randn(shape, device=generator.device, generator=generator, dtype=torch.bfloat16)
    if name.endswith("bias"):
        return values.mul_(0.2)
    if len(shape) == 1:
        gains = values.mul(0.2).add_(1.0)
        # With random signs in the final norm a tied output layer does not just repeat the input token.
        return gains * values.sign() if ".layers." not in name else gains
    scale = LOGIT_STD / math.sqrt(hidden) if "embed" in name or "lm_head" in name else 1 / math.sqrt(shape[1])
    return values.mul_(scale)
