"""The command line: parsing, printing and exit codes; the work is done by the rooms below.

A command is a function in the file of its subject, and an entry in `GROUPS`. Commands import what they run inside the
function, so that `lora-grpo --help` loads neither torch nor vllm.

Exit codes: 0 done, 1 a bug (with its traceback) or damage that `verify` found, 2 an error of `lora_grpo.errors` or of
usage, 130 stopped by Ctrl-C (`train`, `sweep` and `bench`: or by SIGTERM).
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lora_grpo
from lora_grpo.cli.bench import bench
from lora_grpo.cli.changing import pin, prune, rollback, unpin
from lora_grpo.cli.chat import chat
from lora_grpo.cli.check import check
from lora_grpo.cli.comparing import compare, diff
from lora_grpo.cli.copies import export, fork
from lora_grpo.cli.init import init
from lora_grpo.cli.output import say_error
from lora_grpo.cli.report import report
from lora_grpo.cli.serve import serve, store_server
from lora_grpo.cli.sweep import sweep
from lora_grpo.cli.train import demo, evaluate, train
from lora_grpo.cli.verify import verify
from lora_grpo.cli.versions import show, versions
from lora_grpo.errors import LoraGrpoError

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Train": {"init": init, "check": check, "train": train, "sweep": sweep, "eval": evaluate, "demo": demo},
    "Versions of a run": {
        "versions": versions,
        "show": show,
        "report": report,
        "rollback": rollback,
        "fork": fork,
        "diff": diff,
        "compare": compare,
        "chat": chat,
        "export": export,
        "pin": pin,
        "unpin": unpin,
        "prune": prune,
        "verify": verify,
    },
    "Serve and measure": {"serve": serve, "store-server": store_server, "bench": bench},
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


class _Commands(TyperGroup):
    """Turns what any command raises into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraGrpoError as error:
            say_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="GRPO for LoRA adapters on vLLM, without ever merging.",
    epilog="A first run, no GPU needed: lora-grpo demo. Your own: lora-grpo check run.toml, lora-grpo train run.toml.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora-grpo {lora_grpo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _group, _commands in GROUPS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(_command)


def main() -> None:
    """The entry point of `lora-grpo`."""
    # Reward functions are named as modules, and a program installed as a script does not look where it is started.
    sys.path.append(os.getcwd())
    # On a CPU torch warns, whenever vLLM is imported, that there is no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a model or a user wrote is shown whatever the terminal's encoding holds; in JSON it stays the same.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="lora-grpo")
