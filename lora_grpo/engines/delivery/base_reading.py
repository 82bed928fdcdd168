"""What an engine's process reads of its own base: a digest of each slice of each tensor, in the engine's dtype."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_grpo.engines.names import NameMap, Place
from lora_grpo.engines.packing import PLAIN, digest, packed_form


@dataclass(frozen=True, slots=True)
class TensorReading:
    """One tensor: the dtype that it is kept in (a torch dtype's name without the prefix), or computed in where it is
    quantized, and (rows, digest) of the slices that it fills, in the order of its rows."""

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
    tensors: dict[str, TensorReading] = {}
    unread: dict[str, str] = {}
    reached = set()
    for name, shape in shapes.items():
        place = names.tensor(name)
        if place is None and tied and name.split(".")[-2:] == ["lm_head", "weight"]:
            place = names.tensor(embedding)
        if place is None:
            unread[name] = "vLLM's model has no tensor for it"
            continue
        reached.add(place.name)
        module, _, kind = place.name.rpartition(".")
        key = (id(names.modules[module]), kind, place.slices, *shape)
        found = read[key] = read.get(key) or _read(names, place, tuple(shape) or (1,))
        if isinstance(found, str):
            unread[name] = found
        else:
            tensors[name] = found
    own = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    unasked = sorted(name for name in own - reached if not _is_a_scale(names, name))
    return BaseReading(where, tensors, unread, tuple(unasked), time.perf_counter() - started)


def _read(names: NameMap, place: Place, shape: tuple[int, ...]) -> TensorReading | str:
    module, _, kind = place.name.rpartition(".")
    layer = names.modules[module]
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


def _is_a_scale(names: NameMap, name: str) -> bool:
    """Whether a parameter has been read with the quantized weight that it belongs to."""
    module, _, kind = name.rpartition(".")
    weight = packed_form(names.modules[module], "weight")
    return weight is not None and weight.quantized and kind != "bias"
