"""`lora-grpo versions`, `show`, `report` and `verify`: what a run holds, and whether it is whole."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from lora_grpo.cli.options import Json, Run, Version, opened, say, tell
from lora_grpo.errors import StoreError, UnknownVersion, counted

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore


def versions(run: Run, as_json: Json = False) -> None:
    """List a run's adapter versions: where they are stored, their size, rewards and other metrics."""
    from lora_grpo.report import described, for_people

    with opened(run) as store:
        rows = described(store, store.list())
    tell(rows, as_json, [for_people(row) for row in rows], f"versions of {run}")


def show(run: Run, version: Version, as_json: Json = False) -> None:
    """Show everything that is known about one version."""
    from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
    from lora_grpo.report import describe

    with opened(run) as store:
        found = store.get(version)
        children = [child.number for child in store.list() if child.parent == found.number]
        returns = [entry for entry in RollbackLog(run).entries if found.number in (entry.to, entry.left)]
        row = describe(store, found) | {
            "children": children,
            "rollbacks": [{"from": entry.left, "to": entry.to, "reason": entry.reason} for entry in returns],
        }
    shown = row | {
        "created_at": f"{datetime.fromtimestamp(row['created_at']):%Y-%m-%d %H:%M:%S}",
        "where": ", ".join(row["where"]),
        "children": ", ".join(f"v{child}" for child in children),
        "rollbacks": "; ".join(f"v{one.left} to v{one.to}" + f" ({one.reason})" * bool(one.reason) for one in returns),
    }
    shown |= shown.pop("metrics")
    rows = [{"": name, "value": None if value == "" else value} for name, value in shown.items()]
    tell(row, as_json, rows, f"{found} of {run}")


def report(
    run: Run,
    out: Annotated[Path | None, Option("--out", "-o", help="The page; default: RUN/report.html.")] = None,
    watch: Annotated[float | None, Option(min=1, help="Write it again every N seconds until the run ends.")] = None,
) -> None:
    """Write one HTML page about a run: curves, versions, completions, proofs, times, settings.

    It opens from disk and needs no network. With --watch, the page in the browser updates itself.
    """
    from lora_grpo.report import write_report

    if watch:
        say(f"writing the page every {watch:g} s until the run ends")
    typer.echo(write_report(run, out, watch))


def verify(run: Run, as_json: Json = False) -> None:
    """Check every stored copy of every version, every trainer state and the run's history against their checksums.

    Exits with 1 if anything differs or is missing.
    """
    with opened(run) as store:
        # A live run journals a version an instant before it appears: only what stays missing is missing.
        missing = store.missing
        faults = {number: _fault(store, number) for number in {*store.numbers, *store.states}}
        faults |= dict.fromkeys({*missing} & {*store.missing}, "no copy is left")
        rows: list[dict[str, Any]] = [
            {"version": number, "ok": fault is None, "where": sorted(store.where(number)), "found": fault}
            for number, fault in sorted(faults.items())
        ]
        lines = store.damaged_lines
    whole = sum(row["ok"] for row in rows)
    shown = [
        {"version": f"v{row['version']}", "": "ok" if row["ok"] else "DAMAGED", "where": ", ".join(row["where"])}
        | {"found": row["found"]}
        for row in rows
    ]
    ok = whole == len(rows) and not lines
    tell({"ok": ok, "versions": rows, "damaged_lines": lines}, as_json, shown, f"digests of {run}")
    if not as_json:
        nothing = f"{run} holds no versions, so nothing was compared"
        say(f"as they were published: {whole} of {counted(len(rows), 'version')}" if rows else nothing)
        if lines:
            damaged = f"these lines of {run / 'journal.jsonl'} are damaged: {', '.join(map(str, lines))}"
            say(f"{damaged}; their metrics, pins or promotions are lost (delete the lines when that is dealt with)")
    if not ok:
        raise typer.Exit(1)


def _fault(store: AdapterStore, number: int) -> str | None:
    try:
        try:
            store.verify(number)
        except UnknownVersion:
            # Retention has its own rules for trainer states: one may outlive its adapter.
            store.load_state(number)
    except StoreError as error:
        return str(error)
    return None
