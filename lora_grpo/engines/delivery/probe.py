"""What is proven before the first version is published: the engine's base is the trainer's, and an adapter arrives.

A fresh adapter has B = 0 and equals the base, so nothing about its first versions shows whether names, scale, dtype
and kernels are right. The probe does, an adapter with large random A and B: it proves the whole path from file to
log-prob, once per engine start."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.disk import Files, digest_buffers
from lora_grpo.adapters.files.places import require_room
from lora_grpo.adapters.peft_form.modules import assign, peft_model_of
from lora_grpo.adapters.peft_form.serving import ServingForm, restored
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import BaseDescription, Engine, Witness, is_remote
from lora_grpo.engines.compat.patching import replaced
from lora_grpo.engines.delivery.agreement import MAX_BASE_NOISE_NATS, BaseMatch, base_noise, match_base, probe_error
from lora_grpo.errors import ConfigError, DeliveryError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.grpo.processes import Processes
from lora_grpo.types import LogProbs, Sequences

SEPARATION = 20.0
"""How many times the base's own noise the probe must move the log-probs, to be able to prove anything."""
ROUNDINGS, ROUNDINGS_EXACT = 3.0, 0.25
"""How many times what errors of `_JITTER` do an engine's base may differ; the latter where both compute in float32. In
18 families of models on a CPU sound engines differed by 0.3 to 0.6 times that, one by 1.3; in float32 by <= 0.004."""
MIN_SIGNAL_NATS = 1e-3
_JITTER = 2.0**-8
"""Relative; what bfloat16 rounds off."""
_ROWS, TOKENS = 4, 24


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Nats, means over the probe's tokens: `noise` engine against trainer on the base, `signal` adapter against base
    in the trainer, `error` engine against trainer with the adapter; and the limits that they were held to."""

    noise: float
    signal: float
    error: float
    seconds: float
    most_noise: float
    least_signal: float
    most_error: float


Publish: TypeAlias = Callable[[Files], AdapterVersion]
Proofs: TypeAlias = dict[tuple[tuple[str, int], ...], tuple[BaseMatch, ProbeReport]]
"""What was proven of one engine and one base, by the adapter's form: its modules' paths and ranks."""


def prove(
    proofs: Proofs, form: ServingForm, engine: Engine, processes: Processes, scratch: Path, publish: Publish
) -> tuple[BaseMatch, ProbeReport]:
    """For this form of adapter, made where missing, by all processes. Raises as `match_base` and `run_probe`."""
    key = tuple((module.path, module.a_RI.shape[0]) for module in form.modules)
    if key not in proofs:
        matched = next(iter(proofs.values()))[0] if proofs else match_base(engine, form.model, processes)
        pulls = is_remote(engine) and engine.pulls
        if not pulls:
            # Each process writes its own, and one that cannot must not leave the others waiting.
            copies = {"probe": form.nbytes * processes.count}
            processes.each(lambda: require_room(scratch, copies, "the probe of the engine"))
        proofs[key] = matched, run_probe(form, engine, scratch, publish=publish if pulls else None)
    return proofs[key]


def check_has_room(max_model_len: int | None) -> None:
    if max_model_len is not None and max_model_len <= TOKENS:
        said = f"max_model_len={max_model_len} has no room for the probe of the engine, which scores {TOKENS} tokens"
        raise ConfigError(f"{said}: start the engine with max_model_len={TOKENS + 1} at least")


def run_probe(form: ServingForm, engine: Engine, scratch: Path, *, publish: Publish | None = None) -> ProbeReport:
    """Prove that `engine` computes what the model computes, with the base and with a loud adapter, written under
    `scratch` or, where servers pull, by `publish`. Raises `UnsupportedAdapter` when the bases disagree,
    `DeliveryError` when the adapter does not arrive, `NoRoom` when it does not fit."""
    started = time.perf_counter()
    check_has_room(getattr(engine, "max_model_len", None))
    sequences = probe_sequences(engine.describe_base())
    with peft_model_of(form.model).disable_adapter():
        trainer_base = teacher_logprobs(form.model, sequences)
    if not all(math.isfinite(value) for row in trainer_base for value in row):
        ask = "is its checkpoint complete, and does it work in its dtype (float16 overflows where bfloat16 does not)?"
        raise UnsupportedAdapter(f"the trainer's base, without any adapter, gives log-probs that are not finite: {ask}")
    most_noise = _most_noise(form.model, engine, sequences, trainer_base)
    noise = max(base_noise(served, trainer_base, most_noise) for served in _answers(engine, sequences, None))
    needed = max(MIN_SIGNAL_NATS, SEPARATION * noise)
    with restored([parameter for module in form.modules for parameter in (module.a_RI, module.b_OR)]):
        trainer_probe, signal = _grow_loud(form, sequences, trainer_base, needed)
        growth = _growth(form, sequences, trainer_base, trainer_probe)
        witness = Witness(trainer_base, trainer_probe, signal, most_noise, growth)
        with nullcontext(publish(form.files())) if publish else _written(form.files(), scratch) as version:
            engine.load(version)
            try:
                error = max(probe_error(served, witness, noise) for served in _answers(engine, sequences, version))
            finally:
                engine.unload(version)
            if is_remote(engine):
                engine.keep_probe(version, witness, noise)
    seconds = time.perf_counter() - started
    return ProbeReport(noise, signal, error, seconds, most_noise, needed, witness.most_error(noise))


def probe_sequences(base: BaseDescription) -> list[list[int]]:
    """Random sequences of tokens that stand for text, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    rows_BT = torch.randint(base.vocabulary - len(base.placeholders), (_ROWS, TOKENS), generator=generator)
    for placeholder in base.placeholders:
        rows_BT += rows_BT >= placeholder
    return list(rows_BT.tolist())


def _grow_loud(form: ServingForm, sequences: Sequences, base: LogProbs, needed: float) -> tuple[LogProbs, float]:
    """Make A and B random, and grow them until they move log-probs by `needed`: the log-probs, and that movement."""
    for doubling in range(12):
        # A keeps unit gain on its input; B's entries have standard deviation `size` after scaling, over sqrt(rank).
        size, generator = 0.02 * 2.0**doubling, torch.Generator().manual_seed(0)
        for module in form.modules:
            a, b = module.a_RI, module.b_OR
            assign(a, torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
            assign(b, torch.randn(b.shape, generator=generator) * size / (module.scaling * b.shape[1] ** 0.5))
        moved = teacher_logprobs(form.model, sequences)
        signal = mean_abs_difference(moved, base)
        if signal >= needed:
            return moved, signal
    said = f"a large random adapter moves log-probs by {signal:.2g} nats per token, but {needed:.2g} are needed"
    if signal >= MIN_SIGNAL_NATS:
        apart = f"the bases of engine and trainer differ by {needed / SEPARATION:.2g} nats per token"
        fix = "load both from one checkpoint, with the same attention, scaling and dtype"
        raise UnsupportedAdapter(f"{apart}, which hides adapters ({said}): {fix}")
    ask = "is it replaced, or compiled before the adapter came?"
    why = f"the model's forward does not compute the adapted layers ({ask}), or its base is all zeros"
    raise DeliveryError(f"{said}: {why}")


def _growth(form: ServingForm, sequences: Sequences, base: LogProbs, loud: LogProbs) -> float:
    """How many times as much small errors in adapted layers move the loud log-probs as the base's; at least 1."""
    with _jittered(module.layer for module in form.modules):
        shaken_loud = teacher_logprobs(form.model, sequences)
        with peft_model_of(form.model).disable_adapter():
            shaken_base = teacher_logprobs(form.model, sequences)
    quiet = mean_abs_difference(shaken_base, base)
    return max(1.0, mean_abs_difference(shaken_loud, loud) / quiet) if quiet else 1.0


def _most_noise(model: nn.Module, engine: Engine, sequences: list[list[int]], base: LogProbs) -> float:
    """Nats by which an engine's base may differ from the trainer's: a multiple of what rounding does to the latter."""
    with _jittered(model.modules()) as dtypes, peft_model_of(model).disable_adapter():
        moved = mean_abs_difference(teacher_logprobs(model, sequences), base)
    # What a server computes in is not known: vLLM serves float32 checkpoints in half precision.
    exact = dtypes == {torch.float32} and not is_remote(engine) and engine.describe_base().dtype == "float32"
    return min((ROUNDINGS_EXACT if exact else ROUNDINGS) * moved, MAX_BASE_NOISE_NATS) if moved else MAX_BASE_NOISE_NATS


@contextmanager
def _jittered(modules: Iterable[nn.Module]) -> Iterator[set[torch.dtype]]:
    """Relative errors of `_JITTER` in what the modules return, compiled or not; gives the dtypes that were seen."""
    generator, dtypes = torch.Generator().manual_seed(0), set[torch.dtype]()

    def shake(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        dtypes.add(output.dtype)
        return output * (1 + _JITTER * torch.randn(output.shape, generator=generator).to(output))

    with ExitStack() as shaking:
        # No hooks: an output layer that makes no whole logits is called without its own.
        for module in dict.fromkeys(modules):
            shaken = update_wrapper(partial(shake, module.forward), module.forward)
            shaking.enter_context(replaced(module, forward=shaken))
        shaking.enter_context(torch.compiler.set_stance("force_eager"))
        yield dtypes


def _answers(engine: Engine, sequences: list[list[int]], adapter: AdapterVersion | None) -> list[LogProbs]:
    of_each = getattr(engine, "logprobs_of_each", None)
    return of_each(sequences, adapter=adapter) if of_each else [engine.logprobs(sequences, adapter=adapter)]


@contextmanager
def _written(files: Files, scratch: Path) -> Iterator[AdapterVersion]:
    with ExitStack() as held:
        with disk.reported("writing the probe"):
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-probe-", dir=scratch))
            path = Path(folder) / "versions" / "000000"
            path.mkdir(parents=True, mode=0o700)
            for name, buffers in files.items():
                disk.write_file(path / name, buffers, sync=False)
        yield AdapterVersion(0, None, path, digest_buffers(files), -1, time.time())
