"""`lora-grpo compare RUN A B --prompts FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_grpo.cli.live import VERSION_HELP, Json, Run
from lora_grpo.cli.output import print_json, print_table, say


def compare(
    run: Run,
    a: Annotated[str, typer.Argument(metavar="A", help=f"A version: {VERSION_HELP}")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    prompts: Annotated[
        Path,
        typer.Option("--prompts", "-p", help="A .jsonl, .json, .csv or .parquet file of prompts, as the run's data."),
    ],
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Answers a prompt from each version.")] = 1,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="0 is greedy; default: the run's own.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Sample two versions on the same prompts in the same engine batch; compare rewards, lengths and log-probs."""
    from lora_grpo.trainer.compare import compare_run

    result = compare_run(run, a, b, prompts, samples=samples, temperature=temperature, seed=seed)
    document, first, second = result.to_json(), result.first.number, result.second.number
    if as_json:
        print_json(document)
        return
    names = {
        "reward": "reward",
        "tokens": "length, tokens",
        "logp_first_answers": f"log-prob of v{first}'s answers, nats a token",
        "logp_second_answers": f"log-prob of v{second}'s answers, nats a token",
    }
    rows = [_row(words, document[name], first, second) for name, words in names.items() if document[name] is not None]
    print_table(rows, f"v{first} and v{second} of {run}, {len(result.answers) // 2} answers each")
    if result.reward is None:
        say("no reward: the prompts lack the columns that the run's reward functions need")


def _row(words: str, value: dict[str, Any], first: int, second: int) -> dict[str, Any]:
    return {
        "": words,
        f"v{first}": value["first"],
        f"v{second}": value["second"],
        "difference": value["difference"],
        "± (s.e.)": value["standard_error"],
    }
