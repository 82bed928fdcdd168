"""`lora-grpo diff RUN A B` and `lora-grpo compare RUN A B --prompts FILE`: two versions beside each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import VERSION_HELP, Json, Run
from lora_grpo.cli.output import say, tell_rows

A = Annotated[str, typer.Argument(metavar="A", help=f"A version: {VERSION_HELP}")]
B = Annotated[str, typer.Argument(metavar="B", help="Another one.")]


def diff(run: Run, a: A, b: B, as_json: Json = False) -> None:
    """How far two versions are apart in what they add to the base, W = B A (scaling included), module by module.

    change is |W_b - W_a| / |W_a| in the Frobenius norm, cosine <W_a, W_b> / (|W_a| |W_b|); 'all' joins all modules.
    """
    from lora_grpo.adapters.peft_form.difference import difference
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
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
    tell_rows(document, as_json, rows, f"v{first} to v{second} of {run}")


def compare(
    run: Run,
    a: A,
    b: B,
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
    names = {
        "reward": "reward",
        "tokens": "length, tokens",
        "logp_first_answers": f"log-prob of v{first}'s answers, nats a token",
        "logp_second_answers": f"log-prob of v{second}'s answers, nats a token",
    }
    rows = [
        {
            "": words,
            f"v{first}": document[name]["first"],
            f"v{second}": document[name]["second"],
            "difference": document[name]["difference"],
            "± (s.e.)": document[name]["standard_error"],
        }
        for name, words in names.items()
        if document[name] is not None
    ]
    tell_rows(document, as_json, rows, f"v{first} and v{second} of {run}, {len(result.answers) // 2} answers each")
    if result.reward is None and not as_json:
        say("no reward: the prompts lack the columns that the run's reward functions need")
