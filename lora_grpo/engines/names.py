"""One map of names: where a checkpoint's tensor, or the module that PEFT adapts, lies in vLLM's model.

The map is the model's own: the loader's renames (`hf_to_vllm_mapper`, of the model and of each model inside it), its
stacked parameters, and `packed_modules_mapping` where a loader keeps its stacking to itself. A layer may hold several
of a checkpoint's tensors below each other, its slices; a tensor may fill several. A slice is read as its digest."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_grpo.engines import compat
from lora_grpo.engines.packing import PLAIN, digest, packed_form

_WRAPPED = "base_layer"
_REORDERED = (".q_proj.weight", ".k_proj.weight")
_QKV = {"q": 0, "k": 1, "v": 2}


class Place(NamedTuple):
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
        # Its loader reorders the rows of q_proj and k_proj, which it does not with an adapter's B.
        reorders = any(hasattr(module, "permute_qk_weight_for_rotary") for module in model.modules())
        self._reordered = _REORDERED if reorders else ()

    def tensor(self, name: str) -> Place | None:
        """Where checkpoint tensor `name` lies; None where this model has no place for it, or has computed from it."""
        found = None if name.endswith(self._reordered) else self._loaded_as(name)
        if found is None:
            return None
        runtime, shard = found
        if shard is None:
            return self._known(runtime, None) or self._packed(runtime)
        if isinstance(shard, list):
            return None  # the same values in several slices
        return self._known(runtime, shard if isinstance(shard, tuple) else (_QKV.get(shard, shard),))

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
                if (renamed := compat.map_name(mapper, name)) is None:
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

    def layer(self, runtime: str) -> tuple[Any, str]:
        """The layer, None where there is none, and what of it the name is: "weight", "bias", ..."""
        module, _, kind = runtime.rpartition(".")
        return self.modules.get(module), kind

    def _known(self, runtime: str, slices: tuple[int, ...] | None) -> Place | None:
        layer, kind = self.layer(runtime)
        held = getattr(layer, kind, getattr(layer, f"{kind}_packed", None))
        # A tower that vLLM left out is on the meta device; and into some parameters its loader puts -exp, or the like.
        composed = "composed_weight_loader" in getattr(getattr(held, "weight_loader", None), "__qualname__", "")
        absent = held is None or getattr(held, "is_meta", False) or composed
        return None if absent else Place(runtime, slices)

    def rows(self, place: Place, shape: Sequence[int], whole: Sequence[int]) -> dict[int, tuple[int, int]] | None:
        """First row and count of each slice, by index, that a tensor of `shape` fills in `whole`; None: no fit."""
        sizes = self._sizes(place.name)
        if not sizes or sum(sizes) != whole[0]:
            # vLLM pads a vocabulary: its own rows come first.
            sizes = [min(shape[0], whole[0]) if _is_vocabulary(self.layer(place.name)[0]) else whole[0]]
        wanted = range(len(sizes)) if place.slices is None else place.slices
        if max(wanted) >= len(sizes) or [sum(sizes[index] for index in wanted), *whole[1:]] != list(shape):
            return None
        return {index: (sum(sizes[:index]), sizes[index]) for index in wanted}

    def _sizes(self, name: str) -> list[int]:
        layer, _ = self.layer(name)
        return [] if _is_vocabulary(layer) else list(getattr(layer, "output_partition_sizes", None) or ())


def _is_vocabulary(layer: Any) -> bool:
    return hasattr(layer, "org_vocab_size")


@dataclass(frozen=True, slots=True)
class TensorReading:
    """`dtype`: torch's name of the one it is computed in; `slices`: (rows, digest) of each that it fills, in order."""

    dtype: str
    slices: tuple[tuple[int, str], ...]
    quantized: bool = False


@dataclass(frozen=True, slots=True)
class BaseReading:
    """What one engine's process (`where`) read of its base in `seconds`, by checkpoint name, and why not the rest.
    `unasked` are parameters of the engine that no asked name leads to."""

    where: str
    tensors: dict[str, TensorReading]
    unread: dict[str, str]
    unasked: tuple[str, ...] = ()
    seconds: float = 0.0


def read_base(runner: Any, shapes: Mapping[str, Sequence[int]], where: str) -> BaseReading:
    """Read the tensors of `shapes` (of the whole, by checkpoint name) from the model of a vLLM model runner."""
    started = time.perf_counter()
    model = runner.get_model()
    names = NameMap(model)
    tied = runner.model_config.hf_text_config.tie_word_embeddings
    embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), "")
    read: dict[tuple[Any, ...], TensorReading | str] = {}
    found: dict[str, TensorReading | str] = {}
    reached = set()
    for name, shape in shapes.items():
        place = names.tensor(name)
        if place is None and tied and name.split(".")[-2:] == ["lm_head", "weight"]:
            place = names.tensor(embedding)
        if place is None:
            found[name] = "vLLM's model has no tensor for it"
            continue
        reached.add(place.name)
        layer, kind = names.layer(place.name)
        key = (id(layer), kind, place.slices, *shape)
        found[name] = read[key] = read.get(key) or _read(names, place, tuple(shape) or (1,))
    tensors = {name: one for name, one in found.items() if not isinstance(one, str)}
    unread = {name: one for name, one in found.items() if isinstance(one, str)}
    own = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    unasked = sorted(name for name in own - reached if not _is_a_scale(*names.layer(name)))
    return BaseReading(where, tensors, unread, tuple(unasked), time.perf_counter() - started)


def _read(names: NameMap, place: Place, shape: tuple[int, ...]) -> TensorReading | str:
    layer, kind = names.layer(place.name)
    packed = packed_form(layer, kind)
    tensor: Any = getattr(layer, kind, None)
    if packed is None and (tensor is None or tensor.numel() == 0):
        return "vLLM has packed it for its kernels, and nothing read it before"
    dtype = tensor.dtype if packed is None else packed.dtype
    if dtype not in PLAIN:
        return f"vLLM keeps it quantized ({str(dtype).removeprefix('torch.')})"
    whole = tuple(tensor.shape or (1,)) if packed is None else packed.shape
    rows = names.rows(place, shape, whole)
    if rows is None:
        return f"vLLM holds it as {list(whole)}, the checkpoint as {list(shape)}"
    slices = tuple(
        (count, packed.digests[index] if packed else digest(tensor.reshape(whole)[first : first + count], dtype))
        for index, (first, count) in rows.items()
    )
    return TensorReading(str(dtype).removeprefix("torch."), slices, packed is not None and packed.quantized)


def _is_a_scale(layer: Any, kind: str) -> bool:
    """Whether a parameter has been read with the quantized weight that it belongs to."""
    weight = packed_form(layer, "weight")
    return weight is not None and weight.quantized and kind != "bias"
