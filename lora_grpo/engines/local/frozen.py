"""A parameter that refuses to be written to, because an inference engine computes with the same memory."""

from __future__ import annotations

import re
from typing import Any, Self

import torch
from torch import nn

from lora_grpo.errors import ConfigError

_IN_PLACE = re.compile(
    r"(?!requires_grad_|rename_)[a-z]\w*_"
    r"|__i(add|sub|mul|matmul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|__setitem__"
)
_REASON = "an engine computes with the same memory"


class FrozenParameter(nn.Parameter):
    """A view of an engine's weights. Reading costs what it costs of any parameter.

    Every in-place method and `.data`, which PEFT's merge and optimizers write through, raise `ConfigError`. Casting or
    moving it is refused too: that would be a second copy. `copy.deepcopy` gives an ordinary parameter.
    """

    def __new__(cls, view: torch.Tensor) -> Self:
        return torch.Tensor._make_subclass(cls, view, False)

    @property
    def data(self) -> torch.Tensor:
        raise ConfigError(
            f"a base parameter's .data cannot be used: {_REASON}; nothing may merge into it or write to it"
        )

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.data_ptr() != self.data_ptr() or value.dtype != self.dtype or value.shape != self.shape:
            raise ConfigError(
                f"a base parameter cannot be replaced, moved or cast: {_REASON}; use share_base_weights=False"
            )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise ConfigError(f"a base parameter cannot be trained: {_REASON}; train an adapter")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), requires_grad=False))


def _refuse(name: str) -> Any:
    def method(self: FrozenParameter, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"a base parameter cannot be written to ({name}): {_REASON}")

    method.__name__ = name
    return method


for _name in filter(_IN_PLACE.fullmatch, dir(torch.Tensor)):
    setattr(FrozenParameter, _name, _refuse(_name))
