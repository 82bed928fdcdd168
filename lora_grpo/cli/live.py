"""Changing a run: at once when it is stopped, through the process that holds it when it is live."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_grpo.cli.output import say

if TYPE_CHECKING:
    from lora_grpo.adapters.asking.requests import Request
    from lora_grpo.adapters.files.locks import Holder
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.adapters.upkeep.retention import Retention

TIMEOUT_S = 600.0
POLL_S = 0.05
_TAKEN_BACK = "the request was taken back, and nothing has changed"

VERSION_HELP = "12 or v12, head, parent, best, best:METRIC or best:-METRIC (the lowest)."
Version = Annotated[str, typer.Argument(metavar="VERSION", help=VERSION_HELP)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/gsm8k.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of others: grpo.beta=0.1 rewards.0.weight=2"),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0, help="Seconds to wait until a live run begins, before its next step.")
]


def change(
    run: Path,
    verb: str,
    act: Callable[[AdapterStore], dict[str, Any]],
    *,
    timeout_s: float,
    retention: Retention | None = None,
    **args: Any,
) -> dict[str, Any]:
    """What became of it: `act` on the store of a stopped run, the holder's answer for a live one.

    Raises the error that either met, and `StoreError` when a live run has not begun with it after `timeout_s`.
    """
    from lora_grpo.adapters.asking.requests import request
    from lora_grpo.adapters.files.locks import holder
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.errors import StoreLocked

    AdapterStore(archive=run, readonly=True).close()
    deadline = time.monotonic() + timeout_s
    while True:
        if holder(run) is None:
            try:
                with AdapterStore(archive=run, retention=retention) as store:
                    return {"live": False, **act(store)}
            except StoreLocked:
                if time.monotonic() > deadline:
                    raise
                continue
        answer = _wait(run, request(run, verb, **args), deadline)
        if answer is not None:
            return {"live": True, **_done(answer)}


def _wait(run: Path, request: Request, deadline: float) -> dict[str, Any] | None:
    """The holder's answer; None when nobody did what was asked, nor ever will.

    Once it is begun there is no taking it back, so that the deadline is for the beginning.
    """
    from lora_grpo.adapters.asking.requests import answer_to, is_dropped, withdraw
    from lora_grpo.adapters.files.locks import holder

    who = holder(run)
    try:
        say(f"asked {who}, which looks before its next step")
        while (answer := answer_to(run, request)) is None:
            live = holder(run) is not None
            if (not live or time.monotonic() > deadline) and _ended(run, request, who if live else None):
                return None
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        taken_back = withdraw(run, request)
        say(_TAKEN_BACK if taken_back else f"it is too late to take the request back: {who} is doing it, or has done")
        raise
    return None if is_dropped(answer) else answer


def _ended(run: Path, request: Request, who: Holder | None) -> bool:
    """Take the request back from `who` (None: it ended): True when nobody saw it, False when its answer will come."""
    from lora_grpo.adapters.asking.requests import cut_short, is_answered, is_begun, withdraw
    from lora_grpo.errors import StoreError

    if withdraw(run, request):
        if who is None:
            return True
        raise StoreError(
            f"{who} holds {run} and has not answered; {_TAKEN_BACK}. Its step may be a long one: give more time with "
            "--timeout, or stop it and try again"
        )
    # The answer comes before the request goes: what is neither being done nor answered after that never will be.
    waiting = who is not None and is_begun(run, request)
    if not waiting and not is_answered(run, request):
        raise StoreError(cut_short(run))
    return False


def _done(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error that it tells of."""
    from lora_grpo import errors

    if "error" not in answer:
        return answer
    kind = getattr(errors, str(answer.get("kind")), errors.StoreError)
    raise kind(f"the run answered: {answer['error']}")
