"""The `vllm.LLM`s that live in this process, and the process group that they join.

vLLM makes its groups out of the process group that it finds: with one engine in every process, built by all at the same
time, each gets groups of one process and generates on its own. An engine in some of them only waits for the others for
ever; one that is built before the trainer's group leaves a group of one process behind, which a trainer would take for
its own, and train alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lora_grpo.engines.compat import ending
from lora_grpo.errors import ConfigError

_alive: set[int] = set()
_joined = False


def hold(llm: Any) -> None:
    """Count it among the engines of this process, until `let_go`."""
    _alive.add(id(llm))


def let_go(llm: Any) -> None:
    _alive.discard(id(llm))
    ending.shutdown(llm, last=not _alive, joined=_joined)


def engines_alive() -> int:
    return len(_alive)


_SPLIT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def join(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for the process group that there is, asked before an engine starts: a trainer's is joined, and
    left as it is.

    Raises `ConfigError` for an engine over several devices, and where the trainer's process group is still missing.
    """
    for name in _SPLIT:
        if arguments.get(name, 1) != 1:
            raise ConfigError(
                f"{name}={arguments[name]}: an engine in the trainer's process holds one whole model on one device; "
                "serve larger ones with `vllm serve`, and use VLLMServerEngine"
            )
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if launched > 1 and not torch.distributed.is_initialized():
        raise ConfigError(
            f"this is one of {launched} processes that are not connected yet: build accelerate's Accelerator() first"
        )
    global _joined
    if not _alive:
        _joined = torch.distributed.is_initialized()
    if not _joined or torch.distributed.get_world_size() == 1:
        return dict(arguments)
    # Takes the process's own device, where vLLM would take the first one.
    return {"distributed_executor_backend": "external_launcher", **arguments}
