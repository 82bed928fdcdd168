"""What a trainer renders prompts with, and that it numbers tokens as the engine does."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoTokenizer

from lora_grpo.config import ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.local.targets import check_there
from lora_grpo.engines.requests import require_tokenizer
from lora_grpo.errors import ConfigError
from lora_grpo.trainer.models import checkpoint_of


def trainer_tokenizer(model: ModelConfig | nn.Module, processing_class: Any, engine: Engine | None) -> Any:
    """What prompts are rendered with: `processing_class`, else a given engine's own tokenizer, or the checkpoint's.

    Raises `ConfigError` when it numbers tokens otherwise than the engine's; None where there is none.
    """
    served = getattr(engine, "tokenizer", None) if engine is not None else _checkpoint_tokenizer(model)
    if processing_class is None:
        return served
    own = getattr(processing_class, "tokenizer", processing_class)
    if not (hasattr(own, "encode") and hasattr(own, "decode")):
        raise ConfigError(f"processing_class={own!r:.80} is no tokenizer: pass AutoTokenizer.from_pretrained(NAME)")
    check_same_vocabulary(own, served)
    return own


def _checkpoint_tokenizer(model: ModelConfig | nn.Module) -> Any:
    checkpoint = checkpoint_of(model)
    check_there(checkpoint.name, checkpoint.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, **checkpoint.loading)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{checkpoint.name} has no tokenizer that can be read: is tokenizer.json there? {error}"
        ) from error
    require_tokenizer(tokenizer, "prompts are text")
    return tokenizer


def check_same_vocabulary(trainer: Any, engine: Any) -> None:
    """Raises `ConfigError` naming a token that the trainer's tokenizer and the engine's number differently."""
    if not (hasattr(trainer, "get_vocab") and hasattr(engine, "get_vocab")):
        return
    own, served = trainer.get_vocab(), engine.get_vocab()
    odd = next((token for token in own.keys() | served.keys() if own.get(token) != served.get(token)), None)
    if odd is not None:
        raise ConfigError(
            f"token {odd!r} is {own.get(odd)} in processing_class and {served.get(odd)} in the engine's tokenizer; "
            "load both from the same checkpoint, or leave processing_class out"
        )
