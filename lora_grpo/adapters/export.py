"""From the serving form back to a plain PEFT folder: scaling out of B, the original config beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_grpo.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, LoraModule
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import StoreError


@dataclass(frozen=True)
class Recipe:
    """What the serving form leaves out: the adapter's own PEFT config, and each module's scaling by path."""

    config: Mapping[str, Any]
    scalings: Mapping[str, float]

    @classmethod
    def of(cls, peft_config: Any, modules: list[LoraModule]) -> Recipe:
        fields = {name: _plain(value) for name, value in peft_config.to_dict().items()}
        return cls({**fields, "inference_mode": True}, {module.path: module.scaling for module in modules})

    def to_bytes(self) -> bytes:
        return json.dumps({"config": self.config, "scalings": self.scalings}, indent=1).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Recipe:
        return cls(**json.loads(text))


def export_adapter(version: AdapterVersion, recipe: Recipe, directory: Path) -> None:
    """Write `version` to `directory` as PEFT would save it, in fp32 and with its own alpha.

    Training on from it keeps the effective learning rate; the values carry the serving dtype's rounding. Raises
    `StoreError` when the directory already holds an adapter.
    """
    if (directory / WEIGHTS_FILE).exists():
        raise StoreError(f"{directory} already holds an adapter; name an empty or new directory")
    tensors = load_file(version.path / WEIGHTS_FILE)
    plain = {name: _unscaled(name, tensor, recipe) for name, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(plain, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(dict(recipe.config), indent=1))


def _unscaled(name: str, tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    path, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
    return tensor.float() / recipe.scalings[path] if kind == "B.weight" else tensor.float()


def _plain(value: Any) -> Any:
    """A PEFT config value as JSON holds it."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return getattr(value, "value", value)
