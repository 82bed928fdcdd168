"""Whether the loss reaches every adapted layer: where something cuts the gradient, only the rest would be trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lora_grpo.adapters.peft_form.modules import LoraModule
from lora_grpo.errors import UnsupportedAdapter
from lora_grpo.grpo.processes import Processes

_FAINT = 1e-12
"""A gradient by a log-prob up to which the products behind it may be 0 in fp32, as where importance weights vanish."""


class Reach:
    """Looks at the gradients of the first updates that carry a signal, and then no more.

    Each B whose layer was called gets one at once. While B is 0 no A does: that is looked at when B has moved. All
    processes call `check`.
    """

    def __init__(self, modules: Sequence[LoraModule], processes: Processes) -> None:
        self._modules, self._processes = list(modules), processes
        self._called = [False] * len(self._modules)
        self._hooks: list[RemovableHandle] = []
        self._b_known = False
        self._signal = False
        self.watching = True

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

        Attention over one token has no gradient in its queries and keys, so that a token needs two before it.
        """
        if gradient_BT is not None:
            self._signal |= bool(((gradient_BT.abs() > _FAINT) & (positions_BT >= 2)).any())

    def check(self, *, signal: bool | None = None) -> None:
        """Before the optimizer's step, with this update's gradients. `signal` is what `saw` was told, if not given.

        Raises `UnsupportedAdapter` naming the layers that get none; warns once of those that were not called.
        """
        if not self.watching:
            return
        seen, called, b_grad, a_grad, b_moved = self._counted(self._signal if signal is None else signal)
        if not seen[0]:
            return
        if not any(called):
            called = [True] * len(called)  # compiled: its layers run without their hooks
        if not self._b_known:
            self._require("B", [c and not g for c, g in zip(called, b_grad, strict=True)])
            self._warn_of(called)
            self._b_known = True
        moved = [c and m for c, m in zip(called, b_moved, strict=True)]
        if any(moved):
            self._require("A", [m and not g for m, g in zip(moved, a_grad, strict=True)])
            self.watching = False
            self.end()

    def _counted(self, signal: bool) -> list[list[bool]]:
        """What holds in any process: whether there was a signal, and by module: called, B and A got one, B is not 0."""
        a, b = [m.a_RI for m in self._modules], [m.b_OR for m in self._modules]
        device = b[0].device
        parts = [
            torch.tensor([signal], device=device),
            torch.tensor(self._called, device=device),
            *(torch.stack([_got(parameter) for parameter in kind]) for kind in (b, a)),
            torch.stack([_some(parameter.detach()) for parameter in b]),
        ]
        found = self._processes.sum(torch.cat(parts).float()) > 0
        return [part.tolist() for part in found.split([len(part) for part in parts])]

    def _require(self, kind: str, missing: list[bool]) -> None:
        names = [module.path for module, lacks in zip(self._modules, missing, strict=True) if lacks]
        if names:
            raise UnsupportedAdapter(
                f"no gradient reaches {kind} of {len(names)} of {len(self._modules)} adapted layers, so they would "
                f"never be trained: {', '.join(names)}. Something after them stops it, as quantized layers do: train "
                "on an unquantized base, or leave these layers out of target_modules"
            )

    def _warn_of(self, called: list[bool]) -> None:
        names = [module.path for module, was in zip(self._modules, called, strict=True) if not was]
        if names and self._processes.index == 0:
            warnings.warn(
                f"{len(names)} of {len(self._modules)} adapted layers are not called by the model's forward and not "
                f"trained: {', '.join(names)}; leave them out of target_modules",
                stacklevel=2,
            )

    def _note(self, index: int, *_: object) -> None:
        self._called[index] |= torch.is_grad_enabled()


def _got(parameter: Tensor) -> Tensor:
    """Whether it has a gradient; one that is frozen needs none."""
    if not parameter.requires_grad:
        return torch.tensor(True, device=parameter.device)
    return torch.tensor(False, device=parameter.device) if parameter.grad is None else _some(parameter.grad)


def _some(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return (local != 0).any()
