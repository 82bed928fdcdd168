"""Whether an engine's base is the trainer's: config shapes, vocabulary, and a digest of embeddings and norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xxhash

from lora_grpo.engines.base import BaseDescription
from lora_grpo.errors import UnsupportedAdapter

_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_DIGESTED = ("norm.weight", "layernorm.weight", "embed_tokens.weight")


def describe(
    config: Any, parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None
) -> BaseDescription:
    """What a base is, its digests taken in `dtype` (default: its own)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shapes = {name: int(value) for name in _SHAPES if (value := getattr(text, name, None)) is not None}
    digests: dict[str, str] = {}
    own = dtype
    for name, parameter in parameters:
        if name.endswith(_DIGESTED):
            own = own or parameter.dtype
            digests[name] = _digest(parameter.detach(), own, shapes["vocab_size"] if "embed" in name else None)
    return BaseDescription(str(own).removeprefix("torch."), shapes, shapes["vocab_size"], digests)


def check_same_base(engine: BaseDescription, trainer: BaseDescription) -> None:
    """Raises `UnsupportedAdapter` naming the first thing in which the bases differ.

    An engine that could read no parameter (it is behind a wire) has no digests; what it computes is left to the probe.
    """
    for field, size in engine.shapes.items():
        if trainer.shapes.get(field, size) != size:
            raise UnsupportedAdapter(
                f"the engine's base has {field}={size}, the trainer's {trainer.shapes[field]}; load both from the "
                "same checkpoint"
            )
    if not engine.digests:
        return
    shared = engine.digests.keys() & trainer.digests.keys()
    if not shared:
        raise UnsupportedAdapter(
            "no embedding or norm has the same name in engine and trainer; is the trainer's model a CausalLM "
            f"(engine: {sorted(engine.digests)[:2]}, trainer: {sorted(trainer.digests)[:2]})?"
        )
    for name in sorted(shared):
        if engine.digests[name] != trainer.digests[name]:
            raise UnsupportedAdapter(
                f"{name} differs between engine and trainer (compared in {engine.dtype}); load both from the same "
                "checkpoint and revision"
            )


def _digest(parameter: torch.Tensor, dtype: torch.dtype, rows: int | None) -> str:
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    if rows is not None:
        whole = whole[:rows]
    return str(xxhash.xxh3_128(whole.to(dtype).contiguous().cpu().view(torch.uint8).numpy().data).hexdigest())
