"""`lora-grpo chat RUN [VERSION]`."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lora_grpo.cli.live import VERSION_HELP, Run
from lora_grpo.cli.output import say, say_error
from lora_grpo.errors import ConfigError, DeliveryError, StoreError, UnknownVersion

if TYPE_CHECKING:
    from lora_grpo.trainer.chatting import Conversation

COMMANDS = "/version best: another version answers; /new: forget what was said; /quit: end"


def chat(
    run: Run,
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help=VERSION_HELP)] = "head",
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="0 is greedy; default: the run's own.")
    ] = None,
) -> None:
    """Talk to a version of a run, stopped or live, in the terminal.

    It is loaded and proven first. /version best goes on with another one, /new forgets what was said, /quit ends.
    Without a chat template, what you type is completed as plain text.
    """
    from lora_grpo.trainer.chatting import conversing

    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    say("starting an engine ...")
    with conversing(run, version, temperature) as talk:
        say(f"{talk.version} is loaded and proven. {COMMANDS}")
        if not talk.has_template:
            say("the model has no chat template: each line is completed by itself, as plain text")
        while (line := _line(talk)) is not None:
            try:
                _respond(talk, line)
            except (ConfigError, DeliveryError, StoreError, UnknownVersion) as error:
                say_error(error)


def _line(talk: Conversation) -> str | None:
    """What was typed; None for the end of it."""
    try:
        line = input(f"v{talk.version.number}> " if talk.version and sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line == "/quit" else line


def _respond(talk: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/version" and argument:
        receipt = talk.switch(argument.strip())
        say(f"{talk.version} is loaded and proven ({receipt.proven_bytes / 2**20:.2f} MiB compared)")
    elif command == "/new":
        talk.forget()
    elif command.startswith("/"):
        raise ConfigError(f"{line!r} is no command. {COMMANDS}")
    elif line:
        for piece in talk.answer(line):
            typer.echo(piece, nl=False)
        typer.echo()
        if talk.cut:
            say("(cut: it reached the run's max_completion_length)")
