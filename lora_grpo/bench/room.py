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


def engine_share(part: str, settings: Settings, model: Mapping[str, int], memory: Mapping[str, int]) -> float:
    """`gpu_memory_utilization` of an engine; on a GPU one strategy is alive at a time, beside its trainer.

    vLLM only checks that so much is free: the KV cache has a size of its own. Raises `ConfigError` when there is less.
    """
    on_cpu = settings.device == "cpu"
    needed = needed_bytes(part, settings, model)
    if needed > memory["free"] * (1.0 if on_cpu else 0.95):
        what, instead = (
            ("trainer, engine and what is compared with them", "fewer --strategies")
            if on_cpu
            else ("a trainer and an engine, one strategy at a time", "free the GPU")
        )
        raise ConfigError(
            f"bench {part} with {settings.label} needs about {needed / _GIB:.1f} GiB on {settings.device} ({what}), "
            f"and {memory['free'] / _GIB:.1f} GiB are free; use a smaller --shape or {instead}"
        )
    return _CPU_SHARE if on_cpu else round(_engine(model) / memory["total"], 3)


def needed_bytes(part: str, settings: Settings, model: Mapping[str, int]) -> int:
    """What is alive at a time: workers, a merge's pristine copy, the reference; on the CPU the model's files, too."""
    base = 2 * model["parameters"]
    beside = 2 * model["linear_elements"] if "merge-fold" in settings.strategies else 0
    # The fp32 reference where it is alive beside a strategy, and with a trainer, before any strategy starts.
    beside += 4 * model["parameters"] if part == "fidelity" else 0
    oracle = 6 * model["parameters"] + _PROCESS if part == "fidelity" or settings.truth else 0
    if settings.device != "cpu":
        trainer = base + _TRAINER + (_BACKWARD if part == "step" else 0)
        return max(trainer + _engine(model) + beside, oracle)
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * _GIB
    return base + max(_workers(part, settings) * (2 * base + cache + _PROCESS) + beside, oracle)


def _engine(model: Mapping[str, int]) -> int:
    """Bytes of an engine on a GPU."""
    return 2 * model["parameters"] + _ENGINE + KV_CACHE_BYTES


def _workers(part: str, settings: Settings) -> int:
    """How many are alive at once: one that is done stays until the next but one starts, except in `memory`."""
    if part == "memory" or settings.takes_turns:
        return 1
    if part == "decode" and {BASE, STOCK} <= set(settings.strategies):
        return 3
    alone = part in ("fidelity", "endurance")
    return min(2, len({*settings.strategies, *([] if alone else [NATIVE])}))
