"""The command line: parsing, printing and exit codes; the work is done by the rooms below.

A command is a function in a file of its own, and an entry in `COMMANDS`. Commands import what they run inside the
function, so that `lora-grpo --help` loads neither torch nor vllm.

Exit codes: 0 done, 1 a bug (with its traceback), 2 an error of `lora_grpo.errors` or of usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from lora_grpo.cli.demo import demo
from lora_grpo.cli.evaluate import evaluate
from lora_grpo.cli.output import say_error
from lora_grpo.cli.train import train
from lora_grpo.cli.versions import versions
from lora_grpo.errors import LoraGrpoError

COMMANDS: dict[str, Callable[..., None]] = {"train": train, "eval": evaluate, "versions": versions, "demo": demo}


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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """The entry point of `lora-grpo`."""
    # Reward functions are named as modules, and a program installed as a script does not look where it is started.
    sys.path.append(os.getcwd())
    app(prog_name="lora-grpo")
