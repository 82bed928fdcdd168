"""The command line: parsing, printing and exit codes; the work is done by the rooms below.

A command is a function that `GROUPS` names, and imports what it runs: `lora-grpo --help` loads neither torch nor vllm.

Exit codes: 0 done, 1 a bug (with its traceback) or damage that `verify` found, 2 an error of `lora_grpo.errors` or of
usage, 130 stopped by Ctrl-C or SIGTERM."""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lora_grpo
from lora_grpo.cli.options import say_error
from lora_grpo.cli.serve import bench, serve, store_server
from lora_grpo.cli.train import check, demo, evaluate, init, sweep, train
from lora_grpo.cli.using import chat, compare, diff, export, fork
from lora_grpo.cli.versions import pin, prune, report, rollback, show, unpin, verify, versions
from lora_grpo.errors import LoraGrpoError

_OF_RUNS = (versions, show, report, rollback, fork, diff, compare, chat, export, pin, unpin, prune, verify)
GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Train": (init, check, train, sweep, evaluate, demo),
    "Versions of a run": _OF_RUNS,
    "Serve and measure": (serve, store_server, bench),
}
_CALLED = {evaluate: "eval", store_server: "store-server"}
COMMANDS = {_CALLED.get(command, command.__name__): command for group in GROUPS.values() for command in group}


class _Commands(TyperGroup):
    """Turns an error of ours that any command raises into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraGrpoError as error:
            say_error(error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    epilog="A first run that needs no GPU: lora-grpo demo. For your own: lora-grpo init MODEL --data FILE writes "
    "run.toml; then lora-grpo check run.toml and lora-grpo train run.toml.",
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
    """Train LoRA adapters with GRPO on vLLM, without merging them into the base model."""


for _group, _commands in GROUPS.items():
    for _command in _commands:
        app.command(_CALLED.get(_command, _command.__name__), rich_help_panel=_group)(_command)


def main() -> None:
    # Reward functions are named as modules, and a program installed as a script does not look where it is started.
    sys.path.append(os.getcwd())
    # As Ctrl-C: what is open is closed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # On a CPU torch warns, whenever vLLM is imported, that there is no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a model or a user wrote is shown whatever the terminal's encoding holds; in JSON it stays the same.
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # Of vLLM's, whenever it is imported.
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op")
    try:
        app(prog_name="lora-grpo")
    except KeyboardInterrupt:
        sys.stderr.write("stopped before anything began\n")
        sys.exit(130)
