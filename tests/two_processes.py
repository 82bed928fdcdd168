"""Two real processes on the CPU, joined by gloo; a collective that hangs is an error after `TIMEOUT_S`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch

TIMEOUT_S = 60

Scenario: TypeAlias = Callable[[Any, Path], Any]
"""(accelerator, a folder of both processes) -> what to report."""


def in_two(scenarios: dict[str, Scenario], folder: Path) -> list[dict[str, Any]]:
    """What each process reports of each scenario."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run, args=(port, str(folder), scenarios), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, port: int, folder: str, scenarios: dict[str, Scenario]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    from accelerate import Accelerator, InitProcessGroupKwargs

    torch.set_num_threads(1)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=TIMEOUT_S))])
    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        results[name] = scenario(accelerator, Path(folder))
        accelerator.wait_for_everyone()
    torch.save(results, Path(folder) / f"{rank}.pt")
    accelerator.end_training()


@contextmanager
def fsdp2(accelerator: Any, *, by_layer: bool = True) -> Iterator[None]:
    """accelerate set to FSDP2: it reads such settings on GPUs only, so they are put where it looks for them.

    Not `by_layer`, all parameters are one group, which stays whole after a forward.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap" if by_layer else "no_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    state = accelerator.state
    before = state.distributed_type
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    try:
        yield
    finally:
        state.distributed_type = before


def sharded(
    accelerator: Any, model: Any, optimizer: torch.optim.Optimizer, *, by_layer: bool = True
) -> tuple[Any, torch.optim.Optimizer]:
    """By accelerate's own FSDP2."""
    with fsdp2(accelerator, by_layer=by_layer):
        prepared: tuple[Any, torch.optim.Optimizer] = accelerator.prepare(model, optimizer)
    accelerator._models.clear()
    return prepared
