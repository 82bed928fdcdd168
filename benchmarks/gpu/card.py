"""The host as the other parts will find it: `card.py DEVICE`. The last line of stdout is JSON.

Fails where vLLM does not import or the device is not there; packages that are missing are named all at once.
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
    from lora_grpo.bench.commit import commit

    found: dict[str, Any] = {"commit": commit(), "missing_packages": missing_packages()}
    print(json.dumps(found), flush=True)
    from lora_grpo.bench import host
    from lora_grpo.engines import compat

    found |= host.look(device)
    compat.import_vllm()
    release = compat.vllm_release()
    found["vllm"] = {"release": release, "known_by": compat.RELEASES[release]}
    found["compute_capability"] = compat.compute_capability()
    print(json.dumps(found))


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
