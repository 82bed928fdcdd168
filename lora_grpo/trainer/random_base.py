"""A base with random weights, for a model of which only the configuration is there."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_grpo.engines.local.targets import checkpoint_config, full_class
from lora_grpo.errors import ConfigError

KEPT_BY_LAYERS = ("A_log", "D", "dt_bias")  # what state-space layers start from; other values would not be stable


@contextmanager
def random_base(model: str) -> Iterator[str]:
    """A temporary folder with `model`'s configuration, its tokenizer or one of bytes, and weights of a normal
    distribution, loud enough to tell an adapter from rounding. Raises `ConfigError` for what cannot be built."""
    config = checkpoint_config(model)
    try:
        full = full_class(config)
        whole = full._from_config(config) if full else AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: no model can be built from its configuration: {error}") from error
    with tempfile.TemporaryDirectory(prefix="lora-grpo-random-") as folder:
        _fill(whole)
        whole.to(config.dtype or torch.bfloat16).save_pretrained(folder)
        _copy_tokenizer(Path(model), Path(folder))
        yield folder


@torch.no_grad()
def _fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in KEPT_BY_LAYERS and parameter.ndim > 1:
            # A layer's output is about as large as its input.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))


def _copy_tokenizer(model: Path, folder: Path) -> None:
    patterns = ("token*", "vocab*", "merges*", "*.model", "chat_template*")
    names = [path for pattern in patterns for path in model.glob(pattern)]
    for path in names:
        shutil.copy(path, folder)
    if not names:
        tokens = ["<eos>", *sorted(ByteLevel.alphabet())]
        of_bytes = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
        of_bytes.pre_tokenizer, of_bytes.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="<eos>").save_pretrained(folder)
