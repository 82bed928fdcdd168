"""Whether an engine's base is the trainer's: its config, and every tensor by its digest in the engine's dtype."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_grpo.adapters.peft_form.modules import base_tensors, peft_model_of, plain_values, shape_of
from lora_grpo.engines.base import BaseDescription, Engine
from lora_grpo.engines.names import BaseReading, TensorReading
from lora_grpo.engines.packing import PLAIN, digest
from lora_grpo.errors import UnsupportedAdapter
from lora_grpo.grpo.processes import Processes

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps")
_NAMED = 3


@dataclass(frozen=True, slots=True)
class BaseMatch:
    """What was found equal: `compared` of the trainer's `tensors`, which hold `share` of its base's values; of those,
    `quantized` are in fewer bits on a side or on both. `unread` says of each process why it could not read a tensor.
    `read_s` is what the slowest took to read its base, `seconds` all of the comparison, reading included."""

    tensors: int
    compared: int
    share: float
    unread: dict[str, dict[str, str]]
    read_s: float
    seconds: float
    quantized: int = 0

    def __str__(self) -> str:
        said = f"{self.compared} of {self.tensors} tensors equal, {self.share:.1%} of the values"
        if self.quantized:
            said += f" ({self.quantized} quantized ones by their values)"
        said += f"; read in {self.read_s:.2f} s, compared in {self.seconds:.2f} s"
        for where, reasons in self.unread.items():
            some = ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:_NAMED])
            more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
            said += f"; not read in {where}: {some}{more}"
        return said


def describe(config: Any, dtype: str) -> BaseDescription:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (*_SIZES, *_HEADS, *_EPSILONS)
    shapes = {name: value for name in named if (value := getattr(text, name, None)) is not None}
    vocabulary = int(shapes["vocab_size"])
    kinds, fields = ("image", "video", "audio"), ("id", "index")
    tokens = {getattr(config, f"{kind}_token_{field}", None) for kind in kinds for field in fields}
    placeholders = sorted(token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary)
    return BaseDescription(dtype, shapes, vocabulary, tuple(placeholders))


def match_base(engine: Engine, model: nn.Module, processes: Processes) -> BaseMatch:
    """Compare the base of a PEFT `model` with what each of the engine's processes reads of its own. Called by all of
    `processes` together. Raises `UnsupportedAdapter` naming the first thing that differs."""
    started = time.perf_counter()
    served, config = engine.describe_base(), peft_model_of(model).base_model.model.config
    processes.each(lambda: _check_same_shapes(served, describe(config, served.dtype)))
    own = base_tensors(model)
    comparison = _Comparison(engine.read_base({name: shape_of(tensor) for name, tensor in own.items()}))
    for name, tensor in own.items():
        comparison.add(name, tensor)
    return processes.each(lambda: comparison.result(time.perf_counter() - started))


def _check_same_shapes(engine: BaseDescription, trainer: BaseDescription) -> None:
    for field, size in engine.shapes.items():
        own = trainer.shapes.get(field, size)
        if own != size:
            raise UnsupportedAdapter(f"the engine's base has {field}={size}, the trainer's {own}: load one checkpoint")


class _Comparison:
    """Of tensors with every reading. Raises at its end alone: gathering a shard takes all processes, come what may."""

    def __init__(self, readings: Sequence[BaseReading]) -> None:
        self._readings, unasked = readings, "the trainer's base has no tensor for it"
        self._unread = {one.where: one.unread | dict.fromkeys(one.unasked, unasked) for one in readings}
        self._seen: dict[tuple[int, str, tuple[int, ...]], list[str]] = {}
        self._different: str | None = None
        self._found: list[tuple[int, bool, bool]] = []
        """Of each tensor: its values, whether all have it, and whether any keeps it quantized."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole, everywhere = plain_values(gathered), bool(self._readings)
        for reading in self._readings:
            found = reading.tensors.get(name)
            if whole.dtype not in (*PLAIN, torch.float64):
                self._unread[reading.where][name] = f"the trainer keeps it quantized ({_short(tensor.dtype)})"
                everywhere = False
            elif found is None:
                everywhere = False
            elif self._digests(tensor, whole, found) != [one for _, one in found.slices]:
                self._different = self._different or _said(name, gathered, whole, found, reading.where)
        there = everywhere and any(reading.tensors[name].quantized for reading in self._readings)
        self._found.append((whole.numel(), everywhere, there or whole is not gathered))

    def _digests(self, tensor: torch.Tensor, whole: torch.Tensor, found: TensorReading) -> list[str]:
        """Of its rows, cut as the engine's slices are. What has two names is read once."""
        cuts = tuple(rows for rows, _ in found.slices)
        key = (id(tensor), found.dtype, cuts)
        if key not in self._seen:
            pieces = (whole if whole.ndim else whole.reshape(1)).split(list(cuts))
            self._seen[key] = [digest(piece, getattr(torch, found.dtype)) for piece in pieces]
        return self._seen[key]

    def result(self, seconds: float) -> BaseMatch:
        if self._different is not None:
            raise UnsupportedAdapter(self._different)
        unread = {where: reasons for where, reasons in self._unread.items() if reasons}
        read_s = max((reading.seconds for reading in self._readings), default=0.0)
        compared = [(values, quantized) for values, everywhere, quantized in self._found if everywhere]
        share = sum(values for values, _ in compared) / max(1, sum(values for values, *_ in self._found))
        quantized = sum(quantized for _, quantized in compared)
        return BaseMatch(len(self._found), len(compared), share, unread, read_s, seconds, quantized)


def _said(name: str, tensor: torch.Tensor, whole: torch.Tensor, found: TensorReading, where: str) -> str:
    dtypes = f" ({found.dtype} there, {_short(whole.dtype)} here)" if found.dtype != _short(whole.dtype) else ""
    if found.quantized or whole is not tensor:
        there, here = ("quantized" if is_so else "plain" for is_so in (found.quantized, whole is not tensor))
        fix = "load both from one checkpoint in one scheme ([model] quantization, `lora-grpo serve --quantization`)"
        said = f"{name} stands for other values in {where} ({there}) than in the trainer ({here})"
        return f"{said}: {fix} with nothing merged in"
    fix = "load both from the same checkpoint and revision, and train an adapter on that base alone"
    return f"{name} differs between {where} and the trainer{dtypes}; {fix}, with nothing merged into it"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
