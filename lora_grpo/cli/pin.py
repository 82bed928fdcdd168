"""`lora-grpo pin RUN VERSION` and `lora-grpo unpin RUN VERSION`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lora_grpo.cli.live import TIMEOUT_S, Json, Run, Timeout, Version, change
from lora_grpo.cli.output import print_json

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore


def pin(run: Run, version: Version, timeout: Timeout = TIMEOUT_S, as_json: Json = False) -> None:
    """Keep a version, its archived copy and its trainer state until it is unpinned."""
    _change("pin", run, version, timeout, as_json)


def unpin(run: Run, version: Version, timeout: Timeout = TIMEOUT_S, as_json: Json = False) -> None:
    """Leave a version to retention again."""
    _change("unpin", run, version, timeout, as_json)


def _change(verb: str, run: Path, version: str, timeout_s: float, as_json: bool) -> None:
    from lora_grpo.adapters.asking.target import parse_target

    parse_target(version)

    def act(store: AdapterStore) -> dict[str, Any]:
        getattr(store, verb)(version)
        return {"done": f"{verb}ned", "pins": sorted(store.pins)}

    result = change(run, verb, act, timeout_s=timeout_s, version=version)
    if as_json:
        print_json(result)
    else:
        pins = ", ".join(f"v{number}" for number in result["pins"]) or "none"
        typer.echo(f"{result['done']}; pinned are: {pins}")
