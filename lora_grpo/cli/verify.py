"""`lora-grpo verify RUN`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lora_grpo.cli.live import Json, Run
from lora_grpo.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore


def verify(run: Run, as_json: Json = False) -> None:
    """Read every copy of every version and every trainer state, and the run's history, and compare with the digests.

    Exits with 1 when anything differs or is missing.
    """
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
        # A live run journals a version an instant before it appears: only what stays missing is missing.
        missing = store.missing
        rows = [_check(store, number) for number in sorted({*store.numbers, *store.states})]
        rows += [
            {"version": number, "ok": False, "found": "no copy is left"}
            for number in sorted({*missing} & {*store.missing})
        ]
        lines = store.damaged_lines
    damaged = [row for row in rows if not row["ok"]]
    if as_json:
        print_json({"ok": not damaged and not lines, "versions": rows, "damaged_lines": lines})
    else:
        print_table([_for_people(row) for row in rows], f"digests of {run}")
        if rows:
            say(f"{len(rows) - len(damaged)} of {len(rows)} versions are what was published")
        else:
            say(f"{run} holds no versions, so nothing was compared")
        if lines:
            say(
                f"of {run / 'journal.jsonl'} these lines are damaged: {', '.join(map(str, lines))}; metrics, pins or "
                "promotions that they held are lost (delete the lines once that is dealt with)"
            )
    if damaged or lines:
        raise typer.Exit(1)


def _check(store: AdapterStore, number: int) -> dict[str, Any]:
    from lora_grpo.errors import StoreError, UnknownVersion

    where = sorted(store.where(number))
    try:
        try:
            store.verify(number)
        except UnknownVersion:
            # Retention has its own rules for trainer states: one may outlive its adapter.
            store.load_state(number)
    except StoreError as error:
        return {"version": number, "ok": False, "where": where, "found": str(error)}
    return {"version": number, "ok": True, "where": where, "found": None}


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": f"v{row['version']}",
        "": "ok" if row["ok"] else "DAMAGED",
        "where": ", ".join(row["where"]),
        "found": row["found"],
    }
