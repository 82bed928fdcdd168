"""`lora-grpo versions`, `show`, `report` and `verify`: what a run holds, and whether it is whole."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_grpo.cli.options import Json, Run, Version, opened, say, tell

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore


def versions(run: Run, as_json: Json = False) -> None:
    """List a run's adapter versions: where they are, what they weigh, and what is known of them."""
    from lora_grpo.report import described, for_people

    with opened(run) as store:
        rows = described(store, store.list())
    tell(rows, as_json, [for_people(row) for row in rows], f"versions of {run}")


def show(run: Run, version: Version, as_json: Json = False) -> None:
    """Everything that is known of one version."""
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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: RUN/report.html.")] = None,
    watch: Annotated[
        float | None, typer.Option("--watch", min=1, help="Seconds between pages, until the run has ended.")
    ] = None,
) -> None:
    """Write a run as one HTML page: curves, versions, completions, proofs, seconds, settings.

    It opens from disk, without a network. A browser that shows a page of --watch follows the run.
    """
    from lora_grpo.report import write_report

    if watch:
        say(f"writing the page every {watch:g} s, until the run has ended")
    typer.echo(write_report(run, out, watch))


def verify(run: Run, as_json: Json = False) -> None:
    """Read every copy of every version and every trainer state, and the run's history, and compare with the digests.

    Exits with 1 when anything differs or is missing.
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
        say(f"{whole} of {len(rows)} versions are what was published" if rows else nothing)
        if lines:
            say(
                f"of {run / 'journal.jsonl'} these lines are damaged: {', '.join(map(str, lines))}; metrics, pins or "
                "promotions that they held are lost (delete the lines once that is dealt with)"
            )
    if not ok:
        raise typer.Exit(1)


def _fault(store: AdapterStore, number: int) -> str | None:
    from lora_grpo.errors import StoreError, UnknownVersion

    try:
        try:
            store.verify(number)
        except UnknownVersion:
            # Retention has its own rules for trainer states: one may outlive its adapter.
            store.load_state(number)
    except StoreError as error:
        return str(error)
    return None
