"""The machine and the model, looked at before anything is measured; and what programs with committed results share."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.bench.gauges import measure_bandwidth
from lora_grpo.bench.plan import BASE, NATIVE, STOCK, Settings
from lora_grpo.bench.shapes import shape_config
from lora_grpo.engines.local.targets import checkpoint_config
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import package_versions

_GIB = 1 << 30
_PROCESS = int(1.5 * _GIB)  # libraries, buffers and activations of one worker
_TRAINER = 4 * _GIB  # on a GPU, besides its base: CUDA's own, the adapter, logits, a merge's temporaries
_BACKWARD = 4 * _GIB  # more of it in a GRPO step, checkpointed: at most 8 rows of 512 tokens at a time, up to 7B
_ENGINE = 3 * _GIB  # on a GPU, besides its base and its KV cache: CUDA's own, activations, graphs
KV_CACHE_BYTES = 3 << 30  # of every engine on a GPU: room for 64 rows of 512 tokens of the 7B shape
_CPU_SHARE = 0.1  # of memory, where vLLM wants to be told a share and `VLLM_CPU_KVCACHE_SPACE` says the size
COMMIT = "LORA_GRPO_COMMIT"  # says it where the code came without its repository, or beside an older one


def look(device: str) -> dict[str, Any]:
    """Worker: the machine's part of the card, memory and bandwidth. Raises `ConfigError` for a device there is not."""
    check_device(device)
    return {"card": card(device), "memory_bytes": memory(device), "bandwidth": measure_bandwidth(device)}


def check_device(device: str) -> None:
    """Raises `ConfigError` unless `device` is the CPU or a CUDA device of this machine."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is none; use cpu or cuda:0") from None
    if parsed.type == "cpu":
        return
    count = torch.cuda.device_count() if parsed.type == "cuda" else 0
    if (parsed.index or 0) >= count:
        raise ConfigError(f"there is no device {device!r} here ({count} CUDA devices are visible); use --device cpu")


def card(device: str) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    found: dict[str, Any] = {
        "device": device,
        "processor": next(named, "") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **package_versions(),
    }
    if measured := commit():
        found["commit"] = measured
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        size = round(properties.total_memory / _GIB, 1)
        found |= {"gpu": properties.name, "gpu_memory_gib": size, "cuda": torch.version.cuda}
    return found


def commit() -> str | None:
    """What the environment says; else the commit that this code was checked out at, a plus sign where files other than
    results differ; None for an installed copy."""
    if said := os.environ.get(COMMIT):
        return said
    here = Path(__file__).parent.with_name("__init__.py")
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=10, check=True)
        described = [*git, "describe", "--always", "--abbrev=7", "--exclude=*"]
        name = subprocess.run(described, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        # A run that is cut off writes its results, and has to be the same code's when it goes on.
        changes = [*git, "diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results"]
        return name + ("+" if subprocess.run(changes, capture_output=True, timeout=30).returncode else "")
    except (OSError, subprocess.SubprocessError):
        return None


def memory(device: str) -> dict[str, int]:
    if device == "cpu":
        return {"free": psutil.virtual_memory().available, "total": psutil.virtual_memory().total}
    return dict(zip(("free", "total"), torch.cuda.mem_get_info(device), strict=True))


def measure_model(shape: str | None, model: str | None) -> dict[str, int]:
    """Worker: parameters of a model (else of a shape) and elements of its adaptable linear layers, from its config."""
    config: Any = checkpoint_config(model) if model else AutoConfig.for_model(**shape_config(str(shape)))
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    head = skeleton.get_output_embeddings()
    linears = [module for module in skeleton.modules() if isinstance(module, nn.Linear) and module is not head]
    return {
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "linear_elements": sum(linear.weight.numel() for linear in linears),
        "linear_inputs_and_outputs": sum(linear.in_features + linear.out_features for linear in linears),
    }


def engine_share(part: str, settings: Settings, model: Mapping[str, int], memory: Mapping[str, int]) -> float:
    """`gpu_memory_utilization` of an engine; on a GPU one strategy is alive at a time, beside its trainer. vLLM only
    checks that so much is free: the KV cache has a size of its own. Raises `ConfigError` when there is less."""
    on_cpu = settings.device == "cpu"
    needed = needed_bytes(part, settings, model)
    if needed > memory["free"] * (1.0 if on_cpu else 0.95):
        raise ConfigError(
            f"bench {part} with {settings.label} needs about {needed / _GIB:.1f} GiB on {settings.device}, where "
            f"{memory['free'] / _GIB:.1f} are free; use a smaller --shape or "
            f"{'fewer --strategies' if on_cpu else 'free the GPU'}"
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
        return max(base + _TRAINER + (_BACKWARD if part == "step" else 0) + _engine(model) + beside, oracle)
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * _GIB
    return base + max(_workers(part, settings) * (2 * base + cache + _PROCESS) + beside, oracle)


def _engine(model: Mapping[str, int]) -> int:
    return 2 * model["parameters"] + _ENGINE + KV_CACHE_BYTES


def _workers(part: str, settings: Settings) -> int:
    """How many are alive at once: one that is done stays until the next but one starts, except in `memory`."""
    if part == "memory" or settings.takes_turns:
        return 1
    if part == "decode" and {BASE, STOCK} <= set(settings.strategies):
        return 3
    alone = part in ("fidelity", "endurance")
    return min(2, len({*settings.strategies, *([] if alone else [NATIVE])}))


def asked(about: str | None, **defaults: Any) -> argparse.Namespace:
    """Options by name, each of its default's type; a type in a default's place makes one that has to be given, None a
    path that may be left out, a tuple one of its values, the first unless another is asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        how: dict[str, Any] = {"type": Path if default is None else type(default), "default": default}
        if isinstance(default, type):
            how = {"type": default, "required": True}
        elif isinstance(default, tuple):
            how = {"choices": default, "default": default[0]}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser.parse_args()


def provenance(*program: str, device: str = "cpu") -> dict[str, Any]:
    """The command as it was given, the commit (with a plus sign where files differ), and the machine as it is now."""
    machine = card(device)
    commit = machine.pop("commit", "unknown")
    return {"command": shlex.join(["python", *program, *sys.argv[1:]]), "commit": commit, "machine": machine}


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
