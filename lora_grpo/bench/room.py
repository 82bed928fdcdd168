"""Whether a part fits the machine, from the model's size, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lora_grpo.bench.memory import KV_CACHE_BYTES
from lora_grpo.bench.settings import Settings
from lora_grpo.bench.strategies import BASE, NATIVE, STOCK
from lora_grpo.errors import ConfigError

_GIB = 1 << 30
_PROCESS = int(1.5 * _GIB)
"""Libraries, buffers and activations of one worker."""
_TRAINER = 4 * _GIB
"""Of a trainer on a GPU besides its base: CUDA's own, the adapter, logits of forward passes, a merge's temporaries."""
_BACKWARD = 4 * _GIB
"""More of it in a GRPO step, activations checkpointed: at most 8 rows of 512 tokens at a time, up to the 7B shape."""
_ENGINE = 3 * _GIB
"""Of an engine on a GPU besides its base and its KV cache: CUDA's own, activations, graphs."""
_CPU_SHARE = 0.1
"""Of memory, where vLLM wants to be told a share and `VLLM_CPU_KVCACHE_SPACE` says the size."""


def needed_on_cpu(part: str, settings: Settings, model: Mapping[str, int]) -> int:
    """Bytes: the model's files on tmpfs, the workers that are alive at a time, the fp32 reference."""
    base = 2 * model["parameters"]
    pristine = 2 * model["linear_elements"] if "merge-fold" in settings.strategies else 0
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * _GIB
    workers = _workers(part, settings) * (2 * base + cache + _PROCESS)
    return base + max(workers + pristine + _reference_beside(part, model), _oracle(part, settings, model))


def check_cpu(part: str, settings: Settings, model: Mapping[str, int], free_bytes: int) -> None:
    """Raises `ConfigError` when a part does not fit."""
    needed = needed_on_cpu(part, settings, model)
    if needed > free_bytes:
        raise ConfigError(
            f"bench {part} with {settings.label} needs about {needed / _GIB:.1f} GiB (trainer, engine and what is "
            f"compared with them), and {free_bytes / _GIB:.1f} GiB are free; use a smaller --shape or fewer "
            "--strategies"
        )


def engine_shares(
    parts: Mapping[str, Settings], models: Mapping[str, Mapping[str, int]], memory: Mapping[str, int]
) -> dict[str, float]:
    """`gpu_memory_utilization` by model. Raises `ConfigError` when a part does not fit."""
    shares: dict[str, float] = {}
    for part, settings in parts.items():
        model, share = models[settings.label], _CPU_SHARE
        if settings.device == "cpu":
            check_cpu(part, settings, model, memory["free"])
        else:
            share = engine_share(part, settings, model, memory)
        shares[settings.label] = share
    return shares


def engine_share(part: str, settings: Settings, model: Mapping[str, int], memory: Mapping[str, int]) -> float:
    """`gpu_memory_utilization` of an engine beside its trainer, one strategy alive at a time.

    vLLM only checks that so much is free: the KV cache has a size of its own. Raises `ConfigError` when there is less.
    """
    base = 2 * model["parameters"]
    pristine = 2 * model["linear_elements"] if "merge-fold" in settings.strategies else 0
    trainer = base + _TRAINER + (_BACKWARD if part == "step" else 0)
    engine = base + _ENGINE + KV_CACHE_BYTES
    needed = max(trainer + engine + pristine + _reference_beside(part, model), _oracle(part, settings, model))
    if needed > 0.95 * memory["free"]:
        raise ConfigError(
            f"bench {part} with {settings.label} needs about {needed / _GIB:.1f} GiB on {settings.device} (a trainer "
            f"and an engine, one strategy at a time), and {memory['free'] / _GIB:.1f} GiB are free; use a smaller "
            "--shape or free the GPU"
        )
    return round(engine / memory["total"], 3)


def _workers(part: str, settings: Settings) -> int:
    """How many are alive at once: one that is done stays until the next but one starts, except in `memory`."""
    if part == "memory" or settings.takes_turns:
        return 1
    if part == "decode" and {BASE, STOCK} <= set(settings.strategies):
        return 3
    alone = part in ("fidelity", "endurance")
    return min(2, len({*settings.strategies, *([] if alone else [NATIVE])}))


def _reference_beside(part: str, model: Mapping[str, int]) -> int:
    """Bytes of the fp32 reference where it is alive beside a strategy."""
    return 4 * model["parameters"] if part == "fidelity" else 0


def _oracle(part: str, settings: Settings, model: Mapping[str, int]) -> int:
    """Bytes of the fp32 reference and a trainer, before any strategy starts."""
    return 6 * model["parameters"] + _PROCESS if part == "fidelity" or settings.truth else 0
