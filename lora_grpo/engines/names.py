"""One map of names: where a checkpoint's tensor, or the module that PEFT adapts, lies in vLLM's model.

The map is the model's own: the loader's renames (`hf_to_vllm_mapper`, of the model and of each model inside it), its
stacked parameters, and `packed_modules_mapping` where a loader keeps its stacking to itself. A layer of vLLM may hold
several of a checkpoint's tensors below each other, its slices; a tensor may fill one of them or several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_grpo.engines import compat

_WRAPPED = "base_layer"
_REORDERED = (".q_proj.weight", ".k_proj.weight")
_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True, slots=True)
class Place:
    """A runtime name without LoRA wrappers, and the slices of that layer, in order; None for all that it holds."""

    name: str
    slices: tuple[int, ...] | None = None


class NameMap:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._packed_members: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        self.modules: dict[str, Any] = {
            ".".join(part for part in name.split(".") if part != _WRAPPED): module
            for name, module in model.named_modules(remove_duplicate=False)
            if _WRAPPED not in module._modules
        }
        """By their names without LoRA wrappers, what is wrapped in place of its wrapper."""
        self._reordered = _REORDERED if compat.reorders_queries(model) else ()

    def tensor(self, name: str) -> Place | None:
        """Where checkpoint tensor `name` lies; None where this model has no place for it, or has computed from it."""
        found = None if name.endswith(self._reordered) else self._loaded_as(name)
        if found is None:
            return None
        runtime, shard = found
        if shard is None:
            return self._known(runtime, None) or self._packed(runtime)
        # A list: the same values in several slices.
        return None if isinstance(shard, list) else self._known(runtime, _slices(shard))

    def module(self, path: str) -> Place | None:
        place = self.tensor(f"{path}.weight")
        return None if place is None else Place(place.name.removesuffix(".weight"), place.slices)

    def _loaded_as(self, name: str) -> tuple[str, Any] | None:
        """The name, and what slices it fills, as each model on the way down has it; None for what is not loaded."""
        module, passed, shard, above = self._model, "", None, None
        while True:
            mapper = getattr(module, "hf_to_vllm_mapper", None)
            # A model may show its inner model's own as its own too: what is renamed twice has no such name.
            if mapper is not None and mapper is not above:
                above = mapper
                renamed = compat.map_name(mapper, name)
                if renamed is None:
                    return None
                name, shard = renamed[0], renamed[1] if renamed[1] is not None else shard
            child, _, rest = name.partition(".")
            if child not in module._modules or not rest:
                return passed + name, shard
            module, passed, name = module._modules[child], f"{passed}{child}.", rest

    def _packed(self, runtime: str) -> Place | None:
        module, _, kind = runtime.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        for fused, members in self._packed_members.items():
            place = self._known(f"{parent}.{fused}.{kind}", None) if leaf in members else None
            if place is not None and len(self._sizes(place.name)) == len(members):
                return Place(place.name, (members.index(leaf),))
        return None

    def _known(self, runtime: str, slices: tuple[int, ...] | None) -> Place | None:
        module, _, kind = runtime.rpartition(".")
        layer = self.modules.get(module)
        held = getattr(layer, kind, getattr(layer, f"{kind}_packed", None))
        # A tower that vLLM left out has its parameters on the meta device.
        absent = held is None or getattr(held, "is_meta", False) or compat.loads_other_values(held)
        return None if absent else Place(runtime, slices)

    def rows(self, place: Place, shape: Sequence[int], whole: Sequence[int]) -> dict[int, tuple[int, int]] | None:
        """First row and count of each slice, by index, that a tensor of `shape` fills in vLLM's of shape `whole`; None
        where it does not fit."""
        sizes = self._sizes(place.name)
        if not sizes or sum(sizes) != whole[0]:
            # vLLM pads a vocabulary: its own rows come first.
            sizes = [min(shape[0], whole[0]) if self._is_vocabulary(place.name) else whole[0]]
        wanted = range(len(sizes)) if place.slices is None else place.slices
        if max(wanted) >= len(sizes) or [sum(sizes[index] for index in wanted), *whole[1:]] != list(shape):
            return None
        return {index: (sum(sizes[:index]), sizes[index]) for index in wanted}

    def _sizes(self, name: str) -> list[int]:
        module = self.modules[name.rpartition(".")[0]]
        return [] if self._is_vocabulary(name) else list(getattr(module, "output_partition_sizes", None) or ())

    def _is_vocabulary(self, name: str) -> bool:
        return hasattr(self.modules[name.rpartition(".")[0]], "org_vocab_size")


def _slices(shard: Any) -> tuple[int, ...]:
    """vLLM's "q", 1 or (0, 1, 2) as the indices of slices."""
    if isinstance(shard, str):
        return (_QKV[shard],)
    return tuple(shard) if isinstance(shard, tuple) else (int(shard),)
