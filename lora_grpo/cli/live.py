"""Changing a run: at once when it is stopped, through the process that holds it when it is live."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_grpo.cli.output import say

if TYPE_CHECKING:
    from lora_grpo.adapters.requests import Request
    from lora_grpo.adapters.retention import Retention
    from lora_grpo.adapters.store import AdapterStore

TIMEOUT_S = 600.0
POLL_S = 0.05

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/gsm8k.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0, help="Seconds to wait for a live run, which looks before its next step.")
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

    Raises the error that either met, and `StoreError` when a live run has not answered after `timeout_s`.
    """
    from lora_grpo.adapters.locks import holder
    from lora_grpo.adapters.requests import request
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
    """The holder's answer; None when it ended without one, the request then withdrawn."""
    from lora_grpo.adapters.locks import holder
    from lora_grpo.adapters.requests import answer_to, withdraw
    from lora_grpo.errors import StoreError

    who = holder(run)
    say(f"asked {who}, which looks before its next step")
    while time.monotonic() < deadline:
        answer = answer_to(run, request)
        if answer is not None:
            return answer
        if holder(run) is None:
            withdraw(run, request)
            return answer_to(run, request)
        time.sleep(POLL_S)
    if not withdraw(run, request) and (answer := answer_to(run, request)) is not None:
        return answer
    raise StoreError(
        f"{who} holds {run} and has not answered; the request was taken back, and nothing has changed. Its step may "
        "be a long one: give more time with --timeout, or stop it and try again"
    )


def _done(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error that it tells of."""
    from lora_grpo import errors

    if "error" not in answer:
        return answer
    kind = getattr(errors, str(answer.get("kind")), errors.StoreError)
    raise kind(f"the run answered: {answer['error']}")
