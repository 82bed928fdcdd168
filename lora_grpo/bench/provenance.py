"""What programs whose results are committed have in common: options, where a result comes from, and its file."""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def asked(about: str | None, **defaults: Any) -> argparse.Namespace:
    """Options by name, each of its default's type; a type in a default's place makes one that has to be given, None a
    path that may be left out, a tuple one of its values, the first unless another is asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, type):
            parser.add_argument(flag, type=default, required=True)
        elif isinstance(default, tuple):
            parser.add_argument(flag, choices=default, default=default[0])
        else:
            parser.add_argument(flag, type=Path if default is None else type(default), default=default)
    return parser.parse_args()


def provenance(*program: str, device: str = "cpu") -> dict[str, Any]:
    """The command as it was given, the commit (with a plus sign where files differ), and the machine as it is now."""
    from lora_grpo.bench.host import card

    machine = card(device)
    commit = machine.pop("commit", "unknown")
    return {"command": shlex.join(["python", *program, *sys.argv[1:]]), "commit": commit, "machine": machine}


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, where it is to be kept."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
