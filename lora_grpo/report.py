"""A run for people: its versions as rows, and all of it as one HTML page."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files.disk import replace_file, reported
from lora_grpo.adapters.files.locks import holder, is_leased
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import UnknownVersion
from lora_grpo.metrics.page import Lineage, render_page
from lora_grpo.metrics.render import duration

MOST_VERSIONS = 60


def write_report(run: str | Path, path: Path | None = None, watch: float | None = None) -> Path:
    """Write the page of a run and return its path (default: RUN/report.html). A reader sees the old page or the new.

    `watch`: while the run lives, again every so many seconds; it returns when the run has ended. From the program that
    trains, start it as a thread: `Thread(target=write_report, args=("runs/mine",), kwargs={"watch": 30})`. Raises
    `StoreError` where there is no run, or no page can be written.

    >>> print(write_report("runs/mine"))
    runs/mine/report.html
    """
    run = Path(run)
    path = path or run / "report.html"
    while True:
        live = holder(run) is not None
        page = render_page(run, lineage(run), live=live, refresh_s=watch if live else None)
        with reported(f"writing {path}"):
            # A model may have written half a surrogate pair, which UTF-8 does not hold.
            replace_file(path, page.encode("utf-8", errors="backslashreplace"), sync=False)
        if not (live and watch):
            return path
        time.sleep(watch)


def lineage(run: Path) -> Lineage:
    """What the store of `run` tells: every version ever published, and a table of the newest and the notable."""
    with AdapterStore(archive=run, readonly=True) as store:
        kept, head, best = store.list(), store.head, None
        with suppress(UnknownVersion):
            best = store.get("best").number
        notable = {best, head and head.number, *store.pins}
        chosen = [one for one in reversed(kept) if one in kept[-MOST_VERSIONS:] or one.number in notable]
        rows = described(store, chosen[: 2 * MOST_VERSIONS])
        rollbacks = RollbackLog(run).entries
        known = {version.number for version in kept}.union(store.missing)
        # Those that retention removed are in the tree all the same.
        numbers = range(1, max(known.union(one.left for one in rollbacks), default=0) + 1)
        parents = {number: store.parent_of(number) for number in numbers}
        return Lineage(
            parents={number: of for number, of in parents.items() if of is not None or number in {*known, 1}},
            head=None if head is None else head.number,
            best=best,
            pins=store.pins,
            rollbacks=[(one.left, one.to, one.reason or "") for one in rollbacks],
            rows=[for_people(row) for row in rows],
            left_out=len(kept) - len(rows),
        )


def described(store: AdapterStore, versions: list[AdapterVersion]) -> list[dict[str, Any]]:
    """Versions as JSON; one that a live run prunes meanwhile is left out."""
    rows = []
    for version in versions:
        with suppress(UnknownVersion):
            rows.append(describe(store, version))
    return rows


def describe(store: AdapterStore, version: AdapterVersion) -> dict[str, Any]:
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
        "size_bytes": store.manifest(version.number).size_bytes,
        "where": sorted(store.where(version.number)),
        "path": str(store.folder(version.number)),
        "digest": version.digest,
        "metrics": store.metrics(version.number),
    }


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    said = [word for word, key in (("HEAD", "head"), ("pinned", "pinned"), ("served", "served")) if row[key]]
    if "from/run" in row["metrics"]:
        said.append(f"fork of {Path(row['metrics']['from/run']).name} v{row['metrics']['from/version']}")
    return {
        "version": f"v{row['version']}",
        "from": "-" if row["parent"] is None else f"v{row['parent']}",
        "step": row["step"],
        "age": duration(row["age_s"]),
        "MiB": row["size_bytes"] / 2**20,
        **{name: row["metrics"].get(name) for name in ("reward", "eval/reward")},
        "where": ", ".join(row["where"]),
        "": ", ".join(said),
    }
