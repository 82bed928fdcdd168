"""`lora-grpo diff`, `compare`, `chat`, `export` and `fork`: what stored versions are good for."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from lora_grpo.cli.options import A_VERSION, Json, Overrides, Run, Temperature, Version, opened, say, say_error, tell
from lora_grpo.errors import ConfigError, DeliveryError, StoreError, UnknownVersion, counted

if TYPE_CHECKING:
    from lora_grpo.trainer.replay import Conversation

A = Annotated[str, Argument(metavar="A", help=f"A version: {A_VERSION}")]
B = Annotated[str, Argument(metavar="B", help="Another version.")]
COMMANDS = "/version best: switch to another version; /new: forget what was said; /quit: end"


def diff(run: Run, a: A, b: B, as_json: Json = False) -> None:
    """Show how much two versions differ, module by module, in what they add to the base: W = B A, with its scaling.

    change is |W_b - W_a| / |W_a| in the Frobenius norm, cosine <W_a, W_b> / (|W_a| |W_b|); 'all' is all modules."""
    from lora_grpo.adapters.peft_form.export import difference

    with opened(run) as store:
        first, second = store.get(a).number, store.get(b).number
        total, modules = difference(store.readable(first), store.readable(second))
    document = {"first": first, "second": second, "all": asdict(total), "modules": [asdict(m) for m in modules]}
    rows = [
        {
            "module": one.module,
            f"|W| of v{first}": one.first,
            f"|W| of v{second}": one.second,
            "change": "from zero" if one.change is None else f"{one.change:.3%}",
            "cosine": "-" if one.cosine is None else f"{one.cosine:.6f}",
        }
        for one in [*modules, total]
    ]
    tell(document, as_json, rows, f"v{first} to v{second} of {run}")


def compare(
    run: Run,
    a: A,
    b: B,
    prompts: Annotated[Path, Option("--prompts", "-p", help="Prompts: a .jsonl, .json, .csv or .parquet file.")],
    samples: Annotated[int, Option("--samples", "-n", min=1, help="Answers of each version per prompt.")] = 1,
    temperature: Temperature = None,
    seed: Annotated[int, Option(min=0, help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Let two versions answer the same prompts in one batch, and compare rewards, lengths and log-probs."""
    from lora_grpo.trainer.replay import compare_run

    result = compare_run(run, a, b, prompts, samples=samples, temperature=temperature, seed=seed)
    first, second = f"v{result.first}", f"v{result.second}"
    compared = {
        "reward": result.reward,
        "length, tokens": result.tokens,
        f"log-prob of {first}'s answers, nats per token": result.logp_first_answers,
        f"log-prob of {second}'s answers, nats per token": result.logp_second_answers,
    }
    rows = [
        {"": words, first: one.first, second: one.second, "difference": one.difference, "± (s.e.)": one.standard_error}
        for words, one in compared.items()
        if one is not None
    ]
    answers = f"{counted(len(result.answers) // 2, 'answer')} each"
    tell(asdict(result), as_json, rows, f"{first} and {second} of {run}, {answers}")
    if result.reward is None and not as_json:
        say("no reward: the prompts lack the columns that the run's reward functions need")


def chat(
    run: Run,
    version: Annotated[str, Argument(metavar="[VERSION]", help=A_VERSION)] = "head",
    temperature: Temperature = None,
) -> None:
    """Talk to a version in the terminal. The run may be stopped or live.

    The version is loaded and proven first. /version best switches to another, /new forgets what was said, /quit ends.
    Ctrl-C stops an answer, which is then forgotten; at the prompt it ends the talk.
    If the model has no chat template, it completes what you type as plain text."""
    from lora_grpo.trainer.replay import conversing

    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    opened(run).close()
    say("starting an engine ...")
    with conversing(run, version, temperature) as talk:
        say(f"{talk.version} is loaded and proven. {COMMANDS}")
        if not talk.has_template:
            say("the model has no chat template: it completes each line as plain text, without the lines before")
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
        raise ConfigError(f"{line!r} is not a command. {COMMANDS}")
    elif line:
        _answer(talk, line)


def _answer(talk: Conversation, line: str) -> None:
    """Ctrl-C stops it between two pieces, not in the middle of a step of vLLM's; a second one ends the command."""
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in talk.answer(line):
            typer.echo(piece, nl=False)
            if stopped:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    typer.echo()
    if stopped:
        say("(stopped; what you said and this answer are forgotten)")
    elif talk.cut:
        say("(cut off at the run's max_completion_length or max_model_len)")


def export(
    run: Run,
    version: Version,
    directory: Annotated[Path | None, Argument(metavar="[DIR]", help="New or empty; or give --push-to-hub.")] = None,
    push_to_hub: Annotated[str | None, Option(metavar="REPO", help="Upload to the Hugging Face Hub: you/name.")] = None,
    private: Annotated[bool, Option("--private", help="If REPO is new, make it private.")] = False,
    as_json: Json = False,
) -> None:
    """Write a version as a plain PEFT folder, for PeftModel.from_pretrained, vLLM, or further training.

    It has the run's rank, alpha and targets, so further training has the same effective learning rate. If the
    version's trainer state was kept, the weights are exact (fp32), else rounded to the engine's dtype.
    REPO gets the folder, the tokenizer and a model card in one commit. Log in with `hf auth login`, or set HF_TOKEN."""
    if directory is None and push_to_hub is None:
        raise ConfigError("name a directory to write to, or give --push-to-hub REPO")
    from lora_grpo.adapters.peft_form.export import Recipe, export_adapter

    said: dict[str, Any] = {}
    with opened(run) as store:
        found = store.get(version)
        if directory is not None:
            weights = export_adapter(store, found, Recipe.read(run), directory)
            said = {"directory": str(directory), "weights": weights}
    if push_to_hub is not None:
        from lora_grpo import report

        said["commit"] = report.push_to_hub(run, found, push_to_hub, private=private)
    lines = [f"{found} is in {directory}, weights {said['weights']}"] if directory is not None else []
    lines += [f"{found} is at {said['commit']}"] if push_to_hub is not None else []
    tell({"version": found.number, **said}, as_json, "\n".join(lines))


def fork(
    run: Run,
    version: Version,
    new: Annotated[Path, Argument(metavar="NEW", help="The new run's directory.")],
    overrides: Overrides = None,
    weights_only: Annotated[bool, Option("--weights-only", help="Begin at step 0, with a new optimizer.")] = False,
    as_json: Json = False,
) -> None:
    """Make a new run that starts from any version of another. Then `lora-grpo train NEW --resume` trains it.

    It starts with that version's optimizer, schedule, random state and data position, so without new settings it does
    exactly what RUN did. RUN may be live, and stays as it is.
    """
    from lora_grpo.trainer.forking import fork as make

    made = make(run, version, new, overrides or (), weights_only=weights_only)
    document = {"run": str(made.run), "version": made.origin.number, "digest": made.origin.digest, "step": made.step}
    tell(document | {"from": str(made.source), "weights": made.weights}, as_json, str(made))
    if not as_json:
        say(f"go on with: lora-grpo train {new} --resume")
