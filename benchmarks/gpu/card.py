"""The host as the other steps will find it: `card.py DEVICE`. The last line of stdout is JSON.

Fails in one sentence, before anything is allocated, where the device is not there or vLLM is not one that is known."""

import json
import sys
from typing import Any


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
    from lora_grpo.engines.compat.patching import HOPPER, kernel_is_mended

    host.check_device(device)
    release = compat.vllm_release()
    found: dict[str, Any] = {"card": host.card(device)}
    found["memory_bytes"] = host.memory(device)
    print(json.dumps(found), flush=True)
    compat.import_vllm()
    import torch

    # This process may be a fork: here it shows whether one can compute.
    one = torch.ones(8, 8, device=device)
    assert float((one @ one).sum()) == 512
    found["vllm"] = {"release": release, "known_by": compat.RELEASES[release]}
    capability = compat.compute_capability()
    return {**found, "compute_capability": capability, "kernels_mended": capability == HOPPER and kernel_is_mended()}


if __name__ == "__main__":
    main(sys.argv[1])
