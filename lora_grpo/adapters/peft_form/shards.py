"""Parameters that FSDP2 may have sharded: read whole, and written to."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter, gradient or moment that FSDP2 may have sharded (then a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """`full` on the parameter's device, cut as the parameter is; every process holds the same `full`."""
    full = full.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def assign(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Set a parameter that FSDP2 may have sharded to the values of a full tensor, the same in every process."""
    parameter.copy_(sharded_like(parameter, full))


def reshard(model: nn.Module) -> None:
    """Back to shards what FSDP2 keeps whole after a forward without a backward: what is written to those copies,
    or asked of them, never reaches the parameters that the optimizer holds."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
