"""Whether a part fits the machine, from the model's size, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lora_grpo.bench.schema import Settings
from lora_grpo.bench.strategies import BASE, NATIVE, OTHER_KERNELS, SHARED, STOCK
from lora_grpo.errors import ConfigError

_GIB = 1 << 30
_PROCESS = int(1.5 * _GIB)
"""Libraries, buffers and activations of one worker."""
_TRAINER = 4 * _GIB
"""Of a trainer on a GPU besides its base: CUDA's own, the adapter, logits of forward passes, a merge's temporaries."""
_BACKWARD = 4 * _GIB
"""More of it in a GRPO step, activations checkpointed: at most 8 rows of 512 tokens at a time, up to the 7B shape."""
_ENGINE = 3 * _GIB
"""Of an engine on a GPU: activations, graphs and a KV cache that is worth having."""
_CPU_SHARE = 0.1
"""Of memory, where vLLM wants to be told a share and `VLLM_CPU_KVCACHE_SPACE` says the size."""
_MOST_SHARE = 0.3
"""Of a GPU for each engine: a cache that is bigger measures nothing else, and graphs lie outside of it."""


def needed_on_cpu(part: str, settings: Settings, model: Mapping[str, int]) -> int:
    """Bytes: the model's files on tmpfs, the workers that are alive at a time, the fp32 reference."""
    base = 2 * model["parameters"]
    pristine = 2 * model["linear_elements"] if "merge-fold" in settings.strategies else 0
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * _GIB
    workers = 3 if part == "decode" and {BASE, STOCK} <= set(settings.strategies) else _workers(part, settings)
    reference = 4 * model["parameters"] if _has_reference(part, settings) else 0
    return base + workers * (2 * base + cache + _PROCESS) + pristine + reference


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
    """`gpu_memory_utilization` by model: the least that its parts allow, so that a worker of one part is what the next
    asks for. Raises `ConfigError` when a part does not fit."""
    shares: dict[str, float] = {}
    for part, settings in parts.items():
        model, share = models[settings.label], _CPU_SHARE
        if settings.device == "cpu":
            check_cpu(part, settings, model, memory["free"])
        else:
            share = engine_share(part, settings, model, memory)
        shares[settings.label] = min(share, shares.get(settings.label, share))
    return shares


def engine_share(part: str, settings: Settings, model: Mapping[str, int], memory: Mapping[str, int]) -> float:
    """`gpu_memory_utilization` with which two trainers, two engines and the reference fit one GPU.

    Raises `ConfigError` when there is none.
    """
    base = 2 * model["parameters"]
    pristine = 2 * model["linear_elements"]
    reference = 4 * model["parameters"] if _has_reference(part, settings) else 0
    workers = _workers(part, settings)
    trainer = base + _TRAINER + (_BACKWARD if part == "step" else 0)
    left = 0.95 * memory["free"] - workers * trainer - pristine - reference
    share = min(_MOST_SHARE, left / workers / memory["total"])
    if share * memory["total"] < base + _ENGINE:
        raise ConfigError(
            f"bench {part} with {settings.label} leaves each engine {max(0.0, left) / workers / _GIB:.1f} GiB of the "
            f"{memory['free'] / _GIB:.1f} GiB free on {settings.device}, and it needs {(base + _ENGINE) / _GIB:.1f}; "
            "use a smaller --shape or free the GPU"
        )
    return round(share, 3)


def _workers(part: str, settings: Settings) -> int:
    """How many are alive at once: one that is done stays until the next but one starts, except in `memory`."""
    if part == "memory":
        return 1
    alone = part in ("fidelity", "endurance")
    return min(2, len({*settings.strategies, *([] if alone else [NATIVE])}))


def _has_reference(part: str, settings: Settings) -> bool:
    checked = part == "sync" or (part == "decode" and {SHARED, *OTHER_KERNELS} & set(settings.strategies))
    return part == "fidelity" or bool(settings.truth and checked)
