"""From a version back to a plain PEFT folder: its own scaling, exact weights where the trainer's were kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file

from lora_grpo.adapters import disk
from lora_grpo.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, LoraModule
from lora_grpo.adapters.target import Target
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.adapters.view import StoreView
from lora_grpo.errors import StoreCorrupt, StoreError

RECIPE_FILE = "adapter.json"
STATE_TENSORS_FILE = "state.safetensors"
_PREFIX = "base_model.model."

Weights: TypeAlias = Literal["exact", "rounded"]


@dataclass(frozen=True)
class Recipe:
    """What the serving form leaves out: the adapter's own PEFT config, and each module's scaling by path."""

    config: Mapping[str, Any]
    scalings: Mapping[str, float]

    @classmethod
    def of(cls, peft_config: Any, modules: list[LoraModule]) -> Recipe:
        fields = {name: _plain(value) for name, value in peft_config.to_dict().items()}
        return cls({**fields, "inference_mode": True}, {module.path: module.scaling for module in modules})

    def write(self, path: Path) -> None:
        """Keep it in the run directory; written once, since a run's adapter never changes its config."""
        content = json.dumps(asdict(self), indent=1).encode()
        if disk.read_small(path) != content:
            with disk.reported(f"writing {path}"):
                disk.replace_file(path, content, sync=True)

    @classmethod
    def read(cls, run: Path) -> Recipe:
        """Raises `StoreError` for a run directory without one, `StoreCorrupt` for a damaged one."""
        path = run / RECIPE_FILE
        content = disk.read_small(path)
        if content is None:
            raise StoreError(f"{run} has no {RECIPE_FILE}: only runs of NativeSync or GRPOTrainer can be exported")
        try:
            recipe = cls(**disk.parse_json(content))
            if not isinstance(recipe.config, dict) or not all(scale + 0.0 for scale in recipe.scalings.values()):
                raise ValueError("it holds no config with scalings")
            return recipe
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreCorrupt(f"{path} is damaged: {error}") from error


def export_adapter(store: StoreView, version: Target, recipe: Recipe, directory: Path) -> Weights:
    """Write `version` to `directory` as PEFT would save it, in fp32 and with its own alpha.

    Training on from it keeps the effective learning rate. The weights are the trainer's own where its state is kept;
    else they carry the serving dtype's rounding. Raises `StoreError` when the directory already holds an adapter, and
    `StoreCorrupt` when what is stored is not what was published.
    """
    version = store.get(version)
    if (directory / WEIGHTS_FILE).exists() or (directory / CONFIG_FILE).exists():
        raise StoreError(f"{directory} already holds an adapter; name an empty or new directory")
    exact = _trainer_weights(store, version)
    tensors = _serving_weights(store, version, recipe) if exact is None else exact
    with disk.reported(f"exporting {version} to {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        (directory / CONFIG_FILE).write_text(json.dumps(dict(recipe.config), indent=1))
    return "rounded" if exact is None else "exact"


def _trainer_weights(store: StoreView, version: AdapterVersion) -> dict[str, torch.Tensor] | None:
    files = store.load_state(version.number)
    if files is None or STATE_TENSORS_FILE not in files:
        return None
    weights = {
        name.removeprefix("weights/"): tensor.float()
        for name, tensor in load_file(files[STATE_TENSORS_FILE]).items()
        if name.startswith("weights/")
    }
    return {f"{_PREFIX}{name[:-2]}.lora_{name[-1]}.weight": tensor for name, tensor in weights.items()}


def _serving_weights(store: StoreView, version: AdapterVersion, recipe: Recipe) -> dict[str, torch.Tensor]:
    tensors = load_file(store.readable(version) / WEIGHTS_FILE)
    return {name: _unscaled(name, tensor.float(), recipe) for name, tensor in tensors.items()}


def _unscaled(name: str, tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    path, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
    return tensor / recipe.scalings[path] if kind == "B.weight" else tensor


def _plain(value: Any) -> Any:
    """A PEFT config value as JSON holds it."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return getattr(value, "value", value)
