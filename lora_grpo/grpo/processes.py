"""Sums and metrics over all training processes, and what one process has to say of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Reduction = Literal["mean", "min", "max"]


class Observed(NamedTuple):
    """One process's values of a metric, and how they become one number; NaN is no value."""

    values_N: Tensor
    how: Reduction


def mean(values: Tensor, mask_BT: Tensor) -> Observed:
    """To be averaged over the tokens that count, or over rows where there is a value a row."""
    return Observed(counted(values, mask_BT), "mean")


def counted(values: Tensor, mask_BT: Tensor) -> Tensor:
    """(N,) fp32: the values of tokens that count, of (B, T), or all values of (B, 1)."""
    chosen = values[mask_BT] if values.shape == mask_BT.shape else values.flatten()
    return chosen.detach().float()


def row_means(values: Tensor, mask_BT: Tensor) -> Tensor:
    """(B,): each row's mean over its tokens that count, NaN where none does; the row's value where it has one."""
    if values.shape != mask_BT.shape:
        return values.squeeze(1).float()
    return (values * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)


class Processes:
    """This process among all those that train; without an accelerator it is the only one."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes if accelerator else 1

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "sum")

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "max")

    def spread(self, value: int, device: torch.device) -> tuple[int, int]:
        """The least and the greatest of the processes' values."""
        least, greatest = self.max(torch.tensor([-value, value], device=device)).tolist()
        return -least, greatest

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor; of one shape everywhere."""
        if self.count == 1:
            return tensor
        from accelerate.utils import broadcast

        received: Tensor = broadcast(tensor.clone(), from_process=0)
        return received

    def metrics(self, observed: Mapping[str, Observed]) -> dict[str, float]:
        """One number a metric, the same in every process: all have to ask for the same ones. 0 without any value."""
        finite = {name: Observed(values[~values.isnan()], how) for name, (values, how) in observed.items()}
        means = {name: values for name, (values, how) in finite.items() if how == "mean"}
        return self._means(means) | self._extremes({name: o for name, o in finite.items() if o.how != "mean"})

    def _means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        if not values:
            return {}
        sums = torch.stack([torch.stack([v.sum(), torch.full_like(v.sum(), v.numel())]) for v in values.values()])
        return {name: s / max(n, 1.0) for name, (s, n) in zip(values, self.sum(sums).tolist(), strict=True)}

    def _extremes(self, observed: Mapping[str, Observed]) -> dict[str, float]:
        """Minima travel negated, so that one maximum over the processes serves both."""
        if not observed:
            return {}
        sign = {name: -1.0 if how == "min" else 1.0 for name, (_, how) in observed.items()}
        local = [_greatest(sign[name] * values) for name, (values, _) in observed.items()]
        greatest = dict(zip(observed, self.max(torch.stack(local)).tolist(), strict=True))
        return {name: 0.0 if value == -torch.inf else sign[name] * value for name, value in greatest.items()}

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        if self._accelerator is None or self.count == 1:
            return tensor
        from accelerate.utils import reduce

        reduced: Tensor = reduce(tensor, reduction=how)
        return reduced


def _greatest(values_N: Tensor) -> Tensor:
    """-inf where there is none."""
    return torch.cat([values_N, values_N.new_full((1,), -torch.inf)]).amax()
