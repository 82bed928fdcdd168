"""The trainer's own copy of a base, in its checkpoint's bits or in fewer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from lora_grpo.adapters.peft_form.quantized import NF4, Scheme, keep_trainable
from lora_grpo.config import ModelConfig
from lora_grpo.engines.local.targets import checkpoint_config, served_scheme
from lora_grpo.engines.local.text_only import model_class


def quantization_of(model: ModelConfig) -> Scheme | None:
    """How the weights that a run serves are kept. Raises `ConfigError` where that is not proven."""
    return served_scheme(model.name, model.quantization, **model.loading)


def load_base(model: ModelConfig, device: torch.device) -> Any:
    """A transformers model on `device`: nf4 as it is, other quantized weights as the plain values they stand for."""
    config = checkpoint_config(model.name, **model.loading)
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    own = getattr(config, "quantization_config", None)
    asked: dict[str, Any] = {}
    if quantization_of(model) != "nf4" and own is not None:
        config.quantization_config = {**own, "dequantize": True}
        asked["config"] = config
    elif model.quantization == "nf4" and own is None:
        compute = config.get_text_config().dtype or torch.float32 if dtype == "auto" else dtype
        asked["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=compute)
    base: Any = model_class(config).from_pretrained(model.name, dtype=dtype, **model.loading, **asked)
    keep_trainable(base)
    return base.to(device)
