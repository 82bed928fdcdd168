"""`lora-grpo versions RUN`, and `lora-grpo show RUN VERSION`."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.cli.live import Json, Run, Version
from lora_grpo.cli.output import print_json, print_table, tell_rows

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.adapters.version import AdapterVersion


def versions(run: Run, as_json: Json = False) -> None:
    """List a run's adapter versions: where they are, what they weigh, and what is known of them."""
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
        rows = _rows(store)
    tell_rows(rows, as_json, [for_people(row) for row in rows], f"versions of {run}")


def show(run: Run, version: Version, as_json: Json = False) -> None:
    """Everything that is known of one version."""
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.adapters.upkeep.rollbacks import RollbackLog

    with AdapterStore(archive=run, readonly=True) as store:
        found = store.get(version)
        children = [child.number for child in store.list() if child.parent == found.number]
        returns = [entry for entry in RollbackLog(run).entries if found.number in (entry.to, entry.left)]
        row = describe(store, found) | {
            "children": children,
            "rollbacks": [{"from": entry.left, "to": entry.to, "reason": entry.reason} for entry in returns],
        }
    if as_json:
        print_json(row)
        return
    metrics = row.pop("metrics")
    row |= {"created_at": f"{datetime.fromtimestamp(row['created_at']):%Y-%m-%d %H:%M:%S}", "where": _places(row)}
    row |= {"rollbacks": "; ".join(_returned(entry) for entry in row["rollbacks"])}
    row |= {"children": ", ".join(f"v{child}" for child in children)}
    rows = [{"": name, "value": None if value == "" else value} for name, value in {**row, **metrics}.items()]
    print_table(rows, f"{found} of {run}")


def _rows(store: AdapterStore) -> list[dict[str, Any]]:
    """Every version as JSON; one that a live run prunes meanwhile is left out."""
    from lora_grpo.errors import UnknownVersion

    rows = []
    for version in store.list():
        with suppress(UnknownVersion):
            rows.append(describe(store, version))
    return rows


def describe(store: AdapterStore, version: AdapterVersion) -> dict[str, Any]:
    """One version as JSON."""
    from lora_grpo.adapters.files.locks import is_leased
    from lora_grpo.errors import UnknownVersion

    head = None
    with suppress(UnknownVersion):
        head = store.head
    return {
        "version": version.number,
        "parent": version.parent,
        "step": version.step,
        "head": head is not None and version.number == head.number,
        "pinned": version.number in store.pins,
        "served": is_leased(version.path),
        "created_at": version.created_at,
        "age_s": round(time.time() - version.created_at, 1),
        "size_bytes": store.size_bytes(version.number),
        "where": sorted(store.where(version.number)),
        "path": str(version.path),
        "digest": version.digest,
        "metrics": store.metrics(version.number),
    }


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: row["metrics"].get(name) for name in ("reward", "eval/reward")}
    said = [word for word, key in (("HEAD", "head"), ("pinned", "pinned"), ("served", "served")) if row[key]]
    if "from/run" in row["metrics"]:
        said.append(f"fork of {Path(row['metrics']['from/run']).name} v{row['metrics']['from/version']}")
    return {
        "version": f"v{row['version']}",
        "from": "-" if row["parent"] is None else f"v{row['parent']}",
        "step": row["step"],
        "age": age(row["age_s"]),
        "MiB": row["size_bytes"] / 2**20,
        **metrics,
        "where": _places(row),
        "": ", ".join(said),
    }


def _places(row: dict[str, Any]) -> str:
    return ", ".join(row["where"])


def _returned(entry: dict[str, Any]) -> str:
    why = f" ({entry['reason']})" if entry["reason"] else ""
    return f"v{entry['from']} to v{entry['to']}{why}"


def age(seconds: float) -> str:
    """A duration in its two largest units: 45s, 12m 3s, 5h 2m, 3d 4h."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
