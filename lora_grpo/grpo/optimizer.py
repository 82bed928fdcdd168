"""What an update takes: gradients over all processes, whether they reach every layer, optimizer and schedule."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from lora_grpo.adapters.peft_form.modules import LoraModule, whole
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig

_FAINT = 1e-12
"""A gradient by a log-prob up to which the products behind it may be 0 in fp32, as where importance weights vanish."""


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The adapter's parameters by name; refuses a model that trains none, trains others, or trains them in bf16."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("the model has no trainable parameter: build it with peft.get_peft_model and a LoraConfig")
    for name, parameter in trainable.items():
        if "lora_" not in name:
            raise UnsupportedAdapter(f"{name} is trainable but not a LoRA weight: only adapters are trained; freeze it")
        if parameter.dtype != torch.float32:
            fix = "keep autocast_adapter_dtype=True in get_peft_model"
            raise ConfigError(f"{name} is {parameter.dtype}: small updates would round to nothing; {fix}")
    return trainable


def build_optimizer(model: nn.Module, config: GRPOConfig) -> AdamW:
    return AdamW(trainable_parameters(model).values(), **_settings(config))


def _settings(config: GRPOConfig) -> dict[str, Any]:
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}


def apply_settings(optimizer: Optimizer, scheduler: Any, config: GRPOConfig, learning_rate_scale: float) -> None:
    """Have `config` say what a restored state said: the settings of AdamW, and the learning rate of a `LambdaLR`
    schedule, times `learning_rate_scale`, where its count of updates stands. Moments and counts stay."""
    highest = config.learning_rate * learning_rate_scale
    rates = [highest * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(_settings(config) | {"lr": rate, "initial_lr": highest})
    scheduler.base_lrs, scheduler._last_lr = [highest] * len(rates), rates


def plain_optimizer(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> Optimizer:
    """torch's own optimizer, also of a wrapper; refuses one that leaves `parameters` as they are."""
    plain: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    held = {id(parameter) for group in plain.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise ConfigError(f"the optimizer does not hold {name}: build it on this model's trainable parameters")
    return plain


class Gradients:
    """Of one model's trainable parameters: their sum over all processes, its norm, and clipping.

    The losses' normalisers have divided by all rows, so gradients are added, never averaged: those of adapters held
    whole by hand and not by DDP, so that processes may compute different numbers of rows; sharded ones by FSDP2."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        self._parameters, self._processes = list(parameters), processes
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        """What FSDP2 holds of the model: if anything, each forward and backward is one of all processes."""
        for module in self.sharded:
            module.set_gradient_divide_factor(1.0)
            # Without it, a factor of 1 is a reduction that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)

    def zero(self) -> None:
        """Zeros, not None: a step in which no row moves the policy is still one for Adam's moments, everywhere."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def add_up_with(self, last: bool) -> None:
        """FSDP2 adds over the processes once an update, with its `last` backward."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last, recurse=False)

    def add_up(self) -> float:
        """Sums what FSDP2 has not summed; the norm of the sum."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        sharded: list[Tensor] = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        if plain and self._processes.count > 1:
            flat = self._processes.sum(torch.cat([gradient.flatten() for gradient in plain]))
            for gradient, part in zip(plain, flat.split([g.numel() for g in plain]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norms = [whole(get_total_norm(kind)) for kind in (plain, sharded) if kind]
        return get_total_norm(norms).item() if len(norms) > 1 else norms[0].item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale all of them as a gradient of `norm` has to be to have at most `max_norm` (0: any)."""
        if max_norm:
            clip_grads_with_norm_(self._parameters, max_norm, torch.tensor(norm, device=self._parameters[0].device))


class Reach:
    """Whether the loss reaches every adapted layer: where something cuts the gradient, only the rest would be trained.

    It looks at the gradients of the first updates that carry a signal, and then no more. Each B whose layer was called
    gets one at once. While B is 0 no A does: that is looked at when B has moved. All processes call `check`."""

    def __init__(self, modules: Sequence[LoraModule], processes: Processes) -> None:
        self._modules, self._processes = list(modules), processes
        self._called = [False] * len(self._modules)
        self._hooks: list[RemovableHandle] = []
        self._b_known, self._signal, self.watching = False, False, True

    def begin(self) -> None:
        """Note from now on which layers are called with a gradient."""
        self.end()
        if self.watching:
            self._called, self._signal = [False] * len(self._modules), False
            self._hooks = [m.layer.register_forward_hook(partial(self._note, i)) for i, m in enumerate(self._modules)]

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def saw(self, gradient_BT: Tensor | None, positions_BT: Tensor) -> None:
        """The loss's gradient by log-probs, of tokens at these positions: where it is more than faint, it is a signal.

        Attention over one token has no gradient in its queries and keys, so that a token needs two before it."""
        if gradient_BT is not None:
            self._signal |= bool(((gradient_BT.abs() > _FAINT) & (positions_BT >= 2)).any())

    def check(self, *, signal: bool | None = None) -> None:
        """Before the optimizer's step, with this update's gradients. `signal` is what `saw` was told, if not given.

        Raises `UnsupportedAdapter` naming the layers that get none; warns once of those that were not called."""
        if not self.watching:
            return
        seen, called, b_grad, a_grad, b_moved = self._found(self._signal if signal is None else signal)
        if not seen.any():
            return
        called = called | ~called.any()  # none: compiled layers run without their hooks
        if not self._b_known:
            self._require("B", called & ~b_grad)
            if (names := self._named(~called)) and self._processes.index == 0:
                found = f"{len(names)} of {len(self._modules)} adapted layers are not called and not trained"
                warnings.warn(f"{found}: {', '.join(names)}; leave them out of target_modules", stacklevel=2)
            self._b_known = True
        moved = called & b_moved
        if moved.any():
            self._require("A", moved & ~a_grad)
            self.watching = False
            self.end()

    def _found(self, signal: bool) -> Tensor:
        """What holds in any process, a row each: a signal was seen; a module was called, B and A got one, B moved."""
        a, b = [m.a_RI for m in self._modules], [m.b_OR for m in self._modules]
        known = torch.tensor([[signal] * len(b), self._called], device=b[0].device)
        got = [torch.stack([_got(parameter) for parameter in kind]) for kind in (b, a)]
        moved = torch.stack([_some(parameter.detach()) for parameter in b])
        return self._processes.sum(torch.stack([*known, *got, moved]).float()) > 0

    def _named(self, chosen: Tensor) -> list[str]:
        return [module.path for module, is_it in zip(self._modules, chosen.tolist(), strict=True) if is_it]

    def _require(self, kind: str, missing: Tensor) -> None:
        if names := self._named(missing):
            which = f"{kind} of {len(names)} of {len(self._modules)} adapted layers: {', '.join(names)}"
            fix = "as quantized layers do: train on an unquantized base, or leave them out of target_modules"
            raise UnsupportedAdapter(f"no gradient reaches {which}. Something after them stops it, {fix}")

    def _note(self, index: int, *_: object) -> None:
        self._called[index] |= torch.is_grad_enabled()


def _got(parameter: Tensor) -> Tensor:
    """Whether it has a gradient; one that is frozen needs none."""
    if parameter.grad is None or not parameter.requires_grad:
        return torch.tensor(not parameter.requires_grad, device=parameter.device)
    return _some(parameter.grad)


def _some(tensor: Tensor) -> Tensor:
    return ((tensor.to_local() if isinstance(tensor, DTensor) else tensor) != 0).any()
