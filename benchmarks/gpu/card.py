"""The host as the other steps will find it: `card.py DEVICE`. The last line of stdout is JSON.

Fails in one sentence, before anything is allocated, where the device is not there or vLLM is not one that is known.
Steps that the GPU has too little memory for are named with a sentence each, and packages that are missing all at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def main(device: str) -> None:
    from lora_grpo.errors import LoraGrpoError

    try:
        print(json.dumps(look(device)), flush=True)
    except LoraGrpoError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


def look(device: str) -> dict[str, Any]:
    from lora_grpo.bench import host
    from lora_grpo.engines import compat
    from lora_grpo.engines.compat.mends import HOPPER, kernel_is_mended

    host.check_device(device)
    release = compat.vllm_release()
    found: dict[str, Any] = {"missing_packages": missing_packages(), "card": host.card(device)}
    found["memory_bytes"] = host.memory(device)
    found["refused"] = too_large(device, found["memory_bytes"])
    print(json.dumps(found), flush=True)
    compat.import_vllm()
    import torch

    # This process may be a fork: here it shows whether one can compute.
    one = torch.ones(8, 8, device=device)
    assert float((one @ one).sum()) == 512
    found["vllm"] = {"release": release, "known_by": compat.RELEASES[release]}
    capability = compat.compute_capability()
    return {**found, "compute_capability": capability, "kernels_mended": capability == HOPPER and kernel_is_mended()}


def too_large(device: str, memory_bytes: dict[str, int]) -> dict[str, str]:
    """A sentence for each step of figures that does not fit."""
    from steps import plan, scenario

    from lora_grpo.bench import host, room
    from lora_grpo.bench.settings import plan_parts
    from lora_grpo.errors import ConfigError

    refused: dict[str, str] = {}
    for step in plan(Path(), device, Path()):
        if step.shape:
            parts = plan_parts("all", scenario(step.name, device), {"shape": step.shape, "device": device})
            try:
                room.engine_shares(parts, {step.shape: host.measure_model(step.shape, None)}, memory_bytes)
            except ConfigError as error:
                refused[step.name] = str(error)
    return refused


def missing_packages() -> list[str]:
    """What the package depends on, and pytest, as far as it is not installed."""
    needs = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[^\w.-]", need)[0] for need in needs]
    return [name for name in (*names, "pytest") if not installed(name)]


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
