"""`lora-grpo versions`, `show`, `report`, `verify`: what a run holds; `pin`, `unpin`, `rollback`, `prune` change it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer import Argument, Option

from lora_grpo import errors
from lora_grpo.adapters.upkeep.retention import Retention, retention
from lora_grpo.adapters.version import parse_target
from lora_grpo.cli.options import A_VERSION, Json, Run, Version, keys_begun, opened, say, tell
from lora_grpo.errors import ConfigError, StoreError, StoreLocked, UnknownVersion, counted

if TYPE_CHECKING:
    from lora_grpo.adapters.asking.requests import Request
    from lora_grpo.adapters.store import AdapterStore

Act: TypeAlias = "Callable[[AdapterStore], dict[str, Any]]"
TIMEOUT_S = 600.0
POLL_S = 0.05
Timeout = Annotated[float, Option(min=0, help="Seconds to wait for a live run, which acts before its next step.")]
_TAKEN_BACK = "the request was withdrawn, and nothing has changed"


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
        returns = [one for one in RollbackLog(run).entries if found.number in (one.to, one.left)]
        rollbacks = [{"from": one.left, "to": one.to, "reason": one.reason} for one in returns]
        row = {**describe(store, found), "children": children, "rollbacks": rollbacks}
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

    It opens from disk and needs no network. With --watch, the page in the browser updates itself."""
    from lora_grpo.report import write_report

    if watch:
        say(f"writing the page every {watch:g} s until the run ends")
    typer.echo(write_report(run, out, watch))


def verify(run: Run, as_json: Json = False) -> None:
    """Check every stored copy of every version, every trainer state and the run's history against their checksums.

    Exits with 1 if anything differs or is missing."""
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


def pin(run: Run, version: Version, timeout: Timeout = TIMEOUT_S, as_json: Json = False) -> None:
    """Keep a version, its archived copy and its trainer state until you unpin it."""
    _pin("pin", run, version, timeout, as_json)


def unpin(run: Run, version: Version, timeout: Timeout = TIMEOUT_S, as_json: Json = False) -> None:
    """Undo `pin`: the run's `keep` settings decide again when the version is removed."""
    _pin("unpin", run, version, timeout, as_json)


def _pin(verb: str, run: Path, version: str, timeout_s: float, as_json: bool) -> None:
    parse_target(version)

    def act(store: AdapterStore) -> dict[str, Any]:
        getattr(store, verb)(version)
        return {"done": f"{verb}ned", "pins": sorted(store.pins)}

    result = change(run, verb, act, timeout_s=timeout_s, version=version)
    pins = ", ".join(f"v{number}" for number in result["pins"]) or "none"
    tell(result, as_json, f"{result['done']}; pinned are: {pins}")


def rollback(
    run: Run,
    to: Annotated[str, Option(metavar="VERSION", help=A_VERSION)],
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Go back to an earlier version. Training goes on from it, and its next version gets a new number.

    A stopped run goes back at once, and resume goes on from there. A live run goes back before its next step. The
    prompts do not go back, and every sampling seed changes."""
    from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped

    parse_target(to)

    def act(store: AdapterStore) -> dict[str, Any]:
        done = roll_back_stopped(store, to)
        version = store.get(done.to)
        exact = "state" in store.where(done.to)
        moved = f"HEAD moved from v{done.left} to v{done.to}" if done.left != done.to else f"v{done.to} is HEAD already"
        how = "exactly" if exact else "from its rounded weights: its trainer state was not kept"
        said = f"{moved} (step {version.step}); resume goes on from there, {how}"
        result = {"done": said, "version": done.to, "step": version.step, "left": done.left}
        return result | {"weights": "exact" if exact else "rounded"}

    result = change(run, "rollback", act, timeout_s=timeout, to=to)
    tell(result, as_json, result["done"])


def _keys(begun: str) -> list[str]:
    return [key for key in keys_begun(begun) if key.startswith("keep.")]


_KEPT = "Settings that replace the run's: keep.archived=50 keep.trainer_states=2"


def prune(
    run: Run,
    overrides: Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help=_KEPT, autocompletion=_keys)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Remove what the run's `keep` settings no longer keep. HEAD, pinned and loaded versions always stay.

    A live run uses its own settings, as it does after every step."""
    from lora_grpo.adapters.files.locks import holder

    for text in overrides or ():
        if not text.startswith("keep."):
            raise ConfigError(f"{text}: prune takes only keep settings, such as keep.archived=50")
    if overrides and not dry_run and holder(run) is not None:
        raise ConfigError(f"{run} is live and prunes by its own settings; remove {' '.join(overrides)}, or stop it")

    def act(store: AdapterStore) -> dict[str, Any]:
        before, states = set(store.numbers), set(store.states)
        store.prune()
        return _told("removed", sorted(before - set(store.numbers)), sorted(states - set(store.states)))

    if dry_run:
        with opened(run) as reader:
            result = _told("would remove", *reader.prunable(_kept(run, overrides or [])))
    else:
        result = change(run, "prune", act, timeout_s=timeout, keep=lambda: _kept(run, overrides or []))
    tell(result, as_json, result["done"])


def _told(verb: str, removed: list[int], states: list[int]) -> dict[str, Any]:
    done = f"{verb} for good {_listed(removed, 'version')}, and {_listed(states, 'trainer state')}"
    return {"done": done, "removed": removed, "states_removed": states}


def _listed(numbers: list[int], what: str) -> str:
    return counted(len(numbers), what) + (f" ({', '.join(f'v{number}' for number in numbers)})" if numbers else "")


def _kept(run: Path, overrides: list[str]) -> Retention:
    """What a run keeps: by its settings with `overrides`, or by these where it was not started from a file."""
    from lora_grpo.config_file import RESOLVED_FILE, config_of_model, load_config

    if (run / RESOLVED_FILE).is_file():
        return retention(load_config(run, overrides).keep)
    if not {"keep.archived", "keep.trainer_states"} <= {text.partition("=")[0].strip() for text in overrides}:
        raise ConfigError(f"{run} has no {RESOLVED_FILE}: give both keep.archived=N and keep.trainer_states=N")
    return retention(config_of_model(str(run), overrides).keep)


def change(
    run: Path, verb: str, act: Act, *, timeout_s: float, keep: Callable[[], Retention] | None = None, **args: Any
) -> dict[str, Any]:
    """What became of it: `act` on the store of a stopped run, opened with what to `keep`; a live one's holder's answer.
    Raises the error that either met, and `StoreError` when a live run has not begun with it after `timeout_s`."""
    from lora_grpo.adapters.asking.requests import request
    from lora_grpo.adapters.files.locks import holder
    from lora_grpo.adapters.store import AdapterStore

    opened(run).close()
    deadline = time.monotonic() + timeout_s
    while True:
        if holder(run) is None:
            try:
                with AdapterStore(archive=run, retention=keep and keep()) as store:
                    return {"live": False, **act(store)}
            except StoreLocked:
                if time.monotonic() > deadline:
                    raise
                continue
        answer = _wait(request(run, verb, **args), deadline)
        if answer is not None and "error" in answer:
            raise getattr(errors, str(answer.get("kind")), StoreError)(f"the run answered: {answer['error']}")
        if answer is not None:
            return {"live": True, **answer}


def _wait(asked: Request, deadline: float) -> dict[str, Any] | None:
    """The holder's answer; None when nobody did what was asked, nor ever will: the holder ended before. The deadline
    is for the beginning, since there is no taking back what is begun."""
    from lora_grpo.adapters.files.locks import holder

    who = holder(asked.run)
    try:
        say(f"asked {who}, which looks before its next step")
        while (answer := asked.answered()) is None and not asked.is_gone():
            live = holder(asked.run) is not None
            if (not live or time.monotonic() > deadline) and asked.withdraw() and live:
                said = f"{who} holds {asked.run} and has not answered; {_TAKEN_BACK}"
                raise StoreError(f"{said}. Its step may take long: wait longer with --timeout, or stop it first")
            if not live and asked.is_begun():
                raise StoreError(asked.cut_short)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        too_late = f"it is too late to withdraw the request: {who} is doing it or has done it"
        say(_TAKEN_BACK if asked.withdraw() else too_late)
        raise
    return answer
