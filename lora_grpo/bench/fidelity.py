"""Whether the engine serves the policy that it claims to, what of an update is lost, what syncs leave of the base."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_grpo.adapters.peft_form.modules import LoraModule
from lora_grpo.bench.gauges import collect
from lora_grpo.bench.plan import Cell, Settings, Subject, alone
from lora_grpo.bench.schema import TruthRow
from lora_grpo.bench.strategy import Strategy, Trainer
from lora_grpo.engines.delivery.probe import MIN_SIGNAL_NATS, SEPARATION
from lora_grpo.errors import EngineError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs

ORACLE_SEED, DRIFT_RATE = 1, 1e-4


class Reference:
    """The policy in fp32 on plain weights, a checkpoint whose linear weights can be replaced for a while: an oracle
    that shares no code with PEFT's forward, vLLM or any merge."""

    def __init__(self, model: str, device: str) -> None:
        # The checkpoint's own dtype crosses to the device: half of what fp32 would.
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).float().eval()
        self._modules = dict(self.model.named_modules())

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return teacher_logprobs(self.model, sequences)

    def weight(self, path: str) -> torch.Tensor:
        return self._modules[path].weight.detach()

    @contextmanager
    def weights(self, modules: Sequence[LoraModule], new: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Meanwhile, where `modules` are, each forward pass computes with `new(module, base weight)`. No more than one
        new weight is there at a time: a GPU holds one model in fp32, and nothing crosses to the host."""
        replaced = [self._modules[module.path] for module in modules]
        for module, layer in zip(modules, replaced, strict=True):
            layer.forward = partial(_linear, layer, partial(new, module))
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def policy(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Meanwhile, the base plus the trainer's adapter as it is now, summed in fp32."""
        return self.weights(trainer.modules, lambda module, base_OI: base_OI + trainer.update_of(module))


def _linear(layer: nn.Linear, new: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, new(layer.weight.detach().float()).to(x), layer.bias)


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    asked, planned = {"settings": settings}, list[Cell]()
    for strategy in settings.strategies:
        planned.append(alone("fidelity/truth", "truth", truth, subject, strategy))
        planned.append(alone("fidelity/rates", "fidelity", measure, subject, strategy, arguments=asked))
        if strategy in settings.drift_strategies:
            planned.append(alone("fidelity/drift", "drift", drift, subject, strategy, arguments=asked))
    return planned


def oracle(subject: Subject) -> dict[str, Any]:
    """Worker without a strategy: an adapter that is loud enough to tell, and what the fp32 reference says of it.
    Nothing stays but what is returned, so that no engine has to leave room for a model in fp32."""
    trainer, reference, tokens = Trainer(subject), Reference(subject.model, subject.device), subject.sequences()
    base = reference.logprobs(tokens)
    with trainer.model.disable_adapter():
        noise = mean_abs_difference(teacher_logprobs(trainer.model, tokens), base)
    needed = max(MIN_SIGNAL_NATS, SEPARATION * noise)
    for doubling in range(12):
        size = 0.02 * 2.0**doubling
        trainer.randomise(size, ORACLE_SEED)
        with reference.policy(trainer):
            exact = reference.logprobs(tokens)
        signal = mean_abs_difference(exact, base)
        if signal >= needed:
            break
    else:
        raise EngineError(f"no adapter moves the log-probs by {needed:.2g} nats, to be told ({signal:.2g} at most)")
    with reference.policy(trainer):
        # The same weights, computed in bf16 throughout.
        noise = max(noise, mean_abs_difference(teacher_logprobs(reference.model.to(torch.bfloat16), tokens), exact))
    del trainer, reference
    collect(subject.device)
    return {"size": size, "base": base, "exact": exact, "noise_nats": noise, "signal_nats": signal}


def truth(strategy: Strategy, **told: Any) -> list[dict[str, Any]]:
    """Worker: serve the adapter of `oracle`, and compare with what that told of it."""
    before = strategy.trainer.snapshot()
    strategy.trainer.randomise(told["size"], ORACLE_SEED)
    strategy.sync()
    error = mean_abs_difference(strategy.logprobs(strategy.subject.sequences()), told["exact"])
    same_bits = strategy.same_bits()
    strategy.trainer.restore(before)
    strategy.sync()
    noise = max(told["noise_nats"], mean_abs_difference(strategy.base_logprobs, told["base"]))
    return [{"error_nats": error, "noise_nats": noise, "signal_nats": told["signal_nats"], "same_bits": same_bits}]


def measure(strategy: Strategy, settings: Settings) -> list[dict[str, float]]:
    """Worker: for updates of several sizes, what of them is served. AdamW moves an entry of B by up to the learning
    rate a step, and by about its square root of steps over many."""
    strategy.remember_pushed = True
    trainer, tokens, reference = strategy.trainer, strategy.subject.sequences(), restored(strategy)
    base = reference.logprobs(tokens)
    found = []
    for learning_rate, steps in product(settings.learning_rates, settings.updates):
        trainer.reset(learning_rate * steps**0.5)
        strategy.sync()
        with reference.policy(trainer):
            exact = reference.logprobs(tokens)
        row = {
            "learning_rate": learning_rate,
            "updates": steps,
            "signal_nats": mean_abs_difference(exact, base),
            "served_error_nats": mean_abs_difference(strategy.logprobs(tokens), exact),
            "lost_share": _lost_share(strategy, reference),
        }
        found.append(row)
    strategy.remember_pushed = False
    return found


def restored(strategy: Strategy) -> Reference:
    """The reference, and the trainer's frozen base made what it says, whatever merging has left of it."""
    reference = Reference(strategy.subject.model, strategy.subject.device)
    for module in strategy.trainer.modules:
        strategy.trainer.base_weight(module).copy_(reference.weight(module.path))
    return reference


def _lost_share(strategy: Strategy, reference: Reference) -> float:
    """The relative error of the update as served, over all adapted weights."""
    error = size = 0.0
    for module in strategy.trainer.modules:
        base_OI = reference.weight(module.path)
        update_OI = strategy.trainer.update_of(module)
        served_OI = strategy.served_weight(module.path, base_OI) - base_OI
        error += float((served_OI - update_OI).square().sum())
        size += float(update_OI.square().sum())
    return (error / size) ** 0.5


def verdict(row: TruthRow) -> str | None:
    """The sentence that fails the suite, or None."""
    if row.passed:
        return None
    if row.same_bits is False:
        return f"{row.strategy} gives the trainer another base than the checkpoint's on {row.shape}: some bits differ"
    about = f"bf16 alone makes {row.noise_nats:.4f}, the adapter {row.signal_nats:.3f}"
    off = f"its log-probs are {row.error_nats:.4f} nats a token off the fp32 reference ({about})"
    return f"{row.strategy} serves another policy than it claims on {row.shape}: {off}"


def drift(strategy: Strategy, settings: Settings) -> list[dict[str, Any]]:
    """Worker: an adapter as after 100 steps at a learning rate of 1e-4, then a step and a sync a cycle."""
    reference = restored(strategy)
    strategy.trainer.reset(DRIFT_RATE * 10)
    found = []
    for done, cycle in pairwise([0, *sorted(settings.cycles)]):
        for _ in range(cycle - done):
            strategy.trainer.step(DRIFT_RATE)
            strategy.sync()
        found.append({"cycles": cycle, **_drift(strategy, reference)})
    return found


def _drift(strategy: Strategy, reference: Reference) -> dict[str, float]:
    trainer, tokens = strategy.trainer, strategy.subject.sequences()
    apart = size = largest = 0.0
    for module in trainer.modules:
        base_OI = reference.weight(module.path)
        difference_OI = (trainer.base_weight(module).float() - base_OI).abs()
        apart += float(difference_OI.sum())
        size += float(base_OI.abs().sum())
        largest = max(largest, float(difference_OI.max()))
    base = reference.logprobs(tokens)
    with reference.weights(trainer.modules, lambda module, _: trainer.base_weight(module)):
        shift = mean_abs_difference(reference.logprobs(tokens), base)
    return {"mean_relative": apart / size, "max_abs": largest, "logprob_shift_nats": shift}
