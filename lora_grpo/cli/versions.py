"""`lora-grpo versions RUN`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_grpo.cli.output import print_json, print_table


def versions(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/gsm8k.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """List a run's adapter versions: where they are, what they weigh, and what is known of them."""
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
        head, pins = store.head, store.pins
        rows: list[dict[str, Any]] = [
            {
                "version": version.number,
                "parent": version.parent,
                "step": version.step,
                "head": head is not None and version.number == head.number,
                "pinned": version.number in pins,
                "created_at": version.created_at,
                "size_bytes": store.size_bytes(version.number),
                "where": sorted(store.where(version.number)),
                "path": str(version.path),
                "digest": version.digest,
                "metrics": store.metrics(version.number),
            }
            for version in store.list()
        ]
    if as_json:
        print_json(rows)
    else:
        print_table([_for_people(row) for row in rows], f"versions of {run}")


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: row["metrics"].get(name) for name in ("reward", "eval/reward")}
    marks = [mark for mark, holds in (("HEAD", row["head"]), ("pinned", row["pinned"])) if holds]
    return {
        "version": f"v{row['version']}",
        "from": "-" if row["parent"] is None else f"v{row['parent']}",
        "step": row["step"],
        **metrics,
        "MiB": row["size_bytes"] / 2**20,
        "where": ", ".join(row["where"]),
        "created": f"{datetime.fromtimestamp(row['created_at']):%Y-%m-%d %H:%M:%S}",
        "": ", ".join(marks),
    }
