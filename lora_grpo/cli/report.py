"""`lora-grpo report RUN`."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_grpo.cli.live import Run
from lora_grpo.cli.output import say
from lora_grpo.cli.versions import describe, for_people

if TYPE_CHECKING:
    from lora_grpo.metrics.drawing import Lineage

REPORT_FILE = "report.html"
MOST_VERSIONS = 60


def report(
    run: Run,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=f"The page; default: RUN/{REPORT_FILE}.")] = None,
    watch: Annotated[
        float | None, typer.Option("--watch", min=1, help="Seconds between pages, until the run has ended.")
    ] = None,
) -> None:
    """Write a run as one HTML page: curves, versions, completions, proofs, seconds, settings.

    It opens from disk, without a network. A browser that shows a page of --watch follows the run.
    """
    typer.echo(write_report(run, out, watch))


def write_report(run: str | Path, path: Path | None = None, watch: float | None = None) -> Path:
    """Write the page of a run and return its path (default: RUN/report.html). A reader sees the old page or the new.

    `watch`: while the run lives, again every so many seconds; it returns when the run has ended. From the program that
    trains, start it as a thread: `Thread(target=write_report, args=("runs/mine",), kwargs={"watch": 30})`. Raises
    `StoreError` where there is no run, or no page can be written.

    >>> print(write_report("runs/mine"))
    runs/mine/report.html
    """
    from lora_grpo.adapters.files.locks import holder

    run = Path(run)
    path = path or run / REPORT_FILE
    if watch and holder(run) is not None:
        say(f"writing {path} every {watch:g} s, until the run has ended")
        while holder(run) is not None:
            _write(run, path, refresh_s=watch)
            time.sleep(watch)
    _write(run, path)
    return path


def _write(run: Path, path: Path, refresh_s: float | None = None) -> None:
    from lora_grpo.adapters.files.disk import reported
    from lora_grpo.adapters.files.locks import holder
    from lora_grpo.metrics.page import render_page

    page = render_page(run, lineage(run), live=holder(run) is not None, refresh_s=refresh_s)
    staged = path.with_name(f"{path.name}.tmp")
    with reported(f"writing {path}"):
        # A model may have written half a surrogate pair, which UTF-8 does not hold.
        staged.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(staged, path)


def lineage(run: Path) -> Lineage:
    """What the store of `run` tells: every version ever published, and a table of the newest and the notable."""
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
    from lora_grpo.errors import UnknownVersion
    from lora_grpo.metrics.drawing import Lineage

    with AdapterStore(archive=run, readonly=True) as store:
        kept, head, best = store.list(), store.head, None
        with suppress(UnknownVersion):
            best = store.get("best").number
        notable = {best, head and head.number, *store.pins}
        chosen = [one for one in reversed(kept) if one in kept[-MOST_VERSIONS:] or one.number in notable]
        rows = []
        for version in chosen[: 2 * MOST_VERSIONS]:
            with suppress(UnknownVersion):  # which a live run prunes meanwhile
                rows.append(for_people(describe(store, version)))
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
            rows=rows,
            left_out=len(kept) - len(rows),
        )
