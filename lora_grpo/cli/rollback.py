"""`lora-grpo rollback RUN --to VERSION`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_grpo.cli.live import TIMEOUT_S, VERSION_HELP, Json, Run, Timeout, change
from lora_grpo.cli.output import print_json

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore


def rollback(
    run: Run,
    to: Annotated[str, typer.Option("--to", metavar="VERSION", help=VERSION_HELP)],
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Go back to an earlier version: the next one that is trained gets a new number, with that one as its parent.

    A stopped run is moved at once, and goes on from there when it is resumed; a live one before its next step. The
    prompts are not rewound and every sampling seed changes.
    """
    from lora_grpo.adapters.asking.target import parse_target
    from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped

    parse_target(to)

    def act(store: AdapterStore) -> dict[str, Any]:
        done = roll_back_stopped(store, to)
        version = store.get(done.to)
        exact = "state" in store.where(done.to)
        return {
            "done": f"HEAD moved from v{done.left} to v{done.to} (step {version.step}); resume goes on from there, "
            + ("exactly" if exact else "from its rounded weights: its trainer state was not kept"),
            "version": done.to,
            "step": version.step,
            "left": done.left,
            "weights": "exact" if exact else "rounded",
        }

    result = change(run, "rollback", act, timeout_s=timeout, to=to)
    if as_json:
        print_json(result)
    else:
        typer.echo(result["done"])
