"""Whether an engine computes what its trainer does: its base, by config and every tensor's digest, and log-probs."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_grpo.adapters.peft_form.modules import base_tensors, peft_model_of, plain_values, shape_of
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import BaseDescription, Engine, Witness
from lora_grpo.engines.names import TensorReading
from lora_grpo.engines.packing import PLAIN, digest
from lora_grpo.errors import ConfigError, DeliveryError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.grpo.processes import Processes
from lora_grpo.types import Completion, LogProbs

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps")

CANARY_NOISE = 2.0
"""How many times the probe's noise a canary may find on its completions."""
RESOLUTION = 5.0
"""Differences within this many times the noise say nothing."""
MAX_BASE_NOISE_NATS = 0.2


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
            some = ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:3])
            said += f"; not read in {where}: {some}" + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        return said


def describe(config: Any, dtype: str) -> BaseDescription:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shapes = {name: value for name in _SIZES + _HEADS + _EPSILONS if (value := getattr(text, name, None)) is not None}
    vocabulary = int(shapes["vocab_size"])
    kinds, fields = ("image", "video", "audio"), ("id", "index")
    tokens = {getattr(config, f"{kind}_token_{field}", None) for kind in kinds for field in fields}
    placeholders = sorted(token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary)
    return BaseDescription(dtype, shapes, vocabulary, tuple(placeholders))


def match_base(engine: Engine, model: nn.Module, processes: Processes) -> BaseMatch:
    """Compare the base of a PEFT `model` with what each of the engine's processes reads of its own, all `processes`
    together. Raises `UnsupportedAdapter` naming the first thing that differs."""
    started = time.perf_counter()
    served, config = engine.describe_base(), peft_model_of(model).base_model.model.config
    processes.each(lambda: _check_same_shapes(served, describe(config, served.dtype)))
    own = base_tensors(model)
    readings = engine.read_base({name: shape_of(tensor) for name, tensor in own.items()})
    unasked = "the trainer's base has no tensor for it"
    unread = {one.where: one.unread | dict.fromkeys(one.unasked, unasked) for one in readings}
    seen: dict[Any, list[str]] = {}
    different, values, compared = list[str](), 0, list[tuple[int, bool]]()
    for name, tensor in own.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole = plain_values(gathered)
        held = [(one.where, one.tensors[name]) for one in readings if name in one.tensors]
        if whole.dtype not in (*PLAIN, torch.float64):
            held = []
            for reasons in unread.values():
                reasons[name] = f"the trainer keeps it quantized ({_short(tensor.dtype)})"
        for where, found in held:
            # What has two names is read once.
            key = (id(tensor), found.dtype, tuple(rows for rows, _ in found.slices))
            seen[key] = seen.get(key) or _digests(whole, found)
            if seen[key] != [one for _, one in found.slices]:
                different.append(_said(name, gathered, whole, found, where))
        values += whole.numel()
        if held and len(held) == len(readings):
            compared.append((whole.numel(), whole is not gathered or any(found.quantized for _, found in held)))
    # Not before: gathering a shard takes all processes, come what may.
    processes.each(lambda: _refuse(different))
    share, quantized = sum(size for size, _ in compared) / max(1, values), sum(one for _, one in compared)
    read_s = max((reading.seconds for reading in readings), default=0.0)
    unread = {where: reasons for where, reasons in unread.items() if reasons}
    return BaseMatch(len(own), len(compared), share, unread, read_s, time.perf_counter() - started, quantized)


def _check_same_shapes(engine: BaseDescription, trainer: BaseDescription) -> None:
    for field, size in engine.shapes.items():
        own = trainer.shapes.get(field, size)
        if own != size:
            raise UnsupportedAdapter(f"the engine's base has {field}={size}, the trainer's {own}: load one checkpoint")


def _refuse(different: Sequence[str]) -> None:
    if different:
        raise UnsupportedAdapter(different[0])


def _digests(whole: torch.Tensor, found: TensorReading) -> list[str]:
    pieces = (whole if whole.ndim else whole.reshape(1)).split([rows for rows, _ in found.slices])
    return [digest(piece, getattr(torch, found.dtype)) for piece in pieces]


def _said(name: str, tensor: torch.Tensor, whole: torch.Tensor, found: TensorReading, where: str) -> str:
    if found.quantized or whole is not tensor:
        there, here = ("quantized" if is_so else "plain" for is_so in (found.quantized, whole is not tensor))
        fix = "load both from one checkpoint in one scheme ([model] quantization, `lora-grpo serve --quantization`)"
        said = f"{name} stands for other values in {where} ({there}) than in the trainer ({here})"
        return f"{said}: {fix} with nothing merged in"
    dtypes = f" ({found.dtype} there, {_short(whole.dtype)} here)" if found.dtype != _short(whole.dtype) else ""
    fix = "load both from the same checkpoint and revision, and train an adapter on that base alone"
    return f"{name} differs between {where} and the trainer{dtypes}; {fix}, with nothing merged into it"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """Nats, means over completion tokens: `gap` trainer against sampler, `signal` the trainer's adapter against its
    base, `noise` engine against trainer on the base, over the same completions."""

    gap: float
    signal: float
    noise: float
    tokens: int

    @property
    def verdict(self) -> Literal["ok", "failed", "inconclusive"]:
        """A sampler that ignores the adapter has gap = signal. So the gap fails when it is above the noise and half the
        signal; it passes when the signal is large enough to have shown that. Else it is inconclusive; NaN fails."""
        gap, signal, blur = self.gap, self.signal, RESOLUTION * self.noise
        if math.isnan(gap + signal + blur) or gap > max(blur, 0.5 * signal):
            return "failed"
        return "ok" if signal > blur and gap <= 0.5 * signal else "inconclusive"

    def check(self, version: AdapterVersion) -> None:
        """Raises `DeliveryError` where the completions cannot be those of `version`."""
        if self.verdict == "failed":
            raise DeliveryError(f"{self}: the completions were not made by {version}")

    def __str__(self) -> str:
        said = f"canary {self.verdict}: trainer and sampler differ by {self.gap:.4f} nats per token, while the adapter "
        return f"{said}moves them by {self.signal:.4f} (noise {self.noise:.4f}, {self.tokens} tokens)"


def compare(served: LogProbs, expected: LogProbs, others: Sequence[LogProbs], noise: float) -> CanaryReport:
    """Whether log-probs `served` are the `expected` ones and none of the `others`; raises `DeliveryError` when not. The
    signal is the distance to the nearest of the others: "ok" has told the version from each of them."""
    gap = mean_abs_difference(served, expected)
    signal = min((mean_abs_difference(expected, other) for other in others), default=0.0)
    report = CanaryReport(gap, signal, noise, sum(map(len, served)))
    if report.verdict == "failed":
        away = f"the nearest other version is {signal:.4f} away (noise {noise:.4f})"
        raise DeliveryError(f"log-probs are {gap:.4f} nats per token from the expected ones; {away}")
    return report


def probe_error(served: LogProbs, witness: Witness, noise: float) -> float:
    """Nats by which an engine with the probe differs from the trainer; raises `DeliveryError` for too many."""
    error, most = mean_abs_difference(served, witness.loud), witness.most_error(noise)
    if not error <= most:
        differ = f"log-probs differ by {error:.3g} nats where the adapter moves them by {witness.signal:.3g}"
        limit = f"(at most {most:.3g}; base noise {noise:.3g})"
        raise DeliveryError(f"the engine does not apply the adapter as the trainer does: {differ} {limit}")
    return error


def base_noise(served: LogProbs, trainer: LogProbs, most: float) -> float:
    """Nats by which an engine's base differs from the trainer's; raises `UnsupportedAdapter` for another base."""
    noise = mean_abs_difference(served, trainer)
    if not noise <= most:
        said = f"the bases of engine and trainer differ by {noise:.3g} nats per token, but rounding explains {most:.3g}"
        fix = "load both from one checkpoint, in a dtype that it supports, without hooks or another attention"
        raise UnsupportedAdapter(f"{said} at most: {fix}")
    return noise


def take_canary(
    model: nn.Module,
    served_logprobs: Callable[..., LogProbs],
    rows: Sequence[tuple[Sequence[int], Completion]],
    weights: AbstractContextManager[None],
    temperature: float,
    batch_rows: int,
    *,
    known_noise: float,
    most_noise: float,
) -> CanaryReport:
    """Log-probs of completions (`rows`, with their prompts) by the sampler against those by the trainer's policy, which
    the model is inside `weights`, and by its base. `known_noise` (nats, at `temperature`) stands in where they are too
    short to measure it by `served_logprobs`. Noise counts up to `most_noise` (nats, at temperature 1): a base that is
    another one must not widen its own limit. Raises `ConfigError` when no token was sampled, or greedily."""
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: greedy completions carry log-probs at 1; pass temperature=1")
    masks = [made.token_mask or (True,) * len(made.token_ids) for _, made in rows]

    def sampled(logp: Iterable[Sequence[float]]) -> LogProbs:
        """Of each row's, those of the completion's tokens that the policy sampled."""
        ends = [zip(row[len(row) - len(mask) :], mask, strict=True) for row, mask in zip(logp, masks, strict=True)]
        return [[value for value, own in end if own] for end in ends]

    sampler = sampled(made.logprobs for _, made in rows)
    if not any(sampler):
        raise ConfigError("the groups hold no sampled token, so there is nothing to compare; pass completions")
    sequences = [[*prompt, *made.token_ids] for prompt, made in rows]
    scored: Any = {"starts": [len(prompt) for prompt, _ in rows], "rows": batch_rows}
    with weights:
        policy = sampled(teacher_logprobs(model, sequences, temperature=temperature, **scored))
    with peft_model_of(model).disable_adapter():
        whole = teacher_logprobs(model, sequences, temperature=temperature, **scored)
        own = whole if temperature == 1 else teacher_logprobs(model, sequences, **scored)
    # Without the last token, since the engine needs room for one more.
    own = [row[:-1] for row in own]
    served = served_logprobs([ids[:-1] for ids in sequences], adapter=None)
    served = [row[len(row) - len(mine) :] for row, mine in zip(served, own, strict=True)]
    measured = mean_abs_difference(served, own) / temperature if any(served) else known_noise
    noise = min(measured, most_noise / temperature)
    gap, signal = mean_abs_difference(policy, sampler), mean_abs_difference(policy, sampled(whole))
    return CanaryReport(gap, signal, noise, sum(map(len, sampler)))
