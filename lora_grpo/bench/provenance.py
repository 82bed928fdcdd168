"""Where a result comes from, for programs whose results are committed."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from lora_grpo.bench.host import card


def provenance(*program: str, device: str = "cpu") -> dict[str, Any]:
    """The command as it was given, the commit (with a plus sign where files differ), and the machine as it is now."""
    machine = card(device)
    commit = machine.pop("commit", "unknown")
    return {"command": shlex.join(["python", *program, *sys.argv[1:]]), "commit": commit, "machine": machine}
