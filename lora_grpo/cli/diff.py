"""`lora-grpo diff RUN A B`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lora_grpo.cli.live import VERSION_HELP, Json, Run
from lora_grpo.cli.output import print_json, print_table


def diff(
    run: Run,
    a: Annotated[str, typer.Argument(metavar="A", help=f"A version: {VERSION_HELP}")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """How far two versions are apart in what they add to the base, W = B A (scaling included), module by module.

    change is |W_b - W_a| / |W_a| in the Frobenius norm, cosine <W_a, W_b> / (|W_a| |W_b|); 'all' joins all modules.
    """
    from lora_grpo.adapters.peft_form.difference import difference
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
        first, second = store.get(a).number, store.get(b).number
        total, modules = difference(store.readable(first), store.readable(second))
    if as_json:
        print_json({"first": first, "second": second, "all": asdict(total), "modules": [asdict(m) for m in modules]})
        return
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
    print_table(rows, f"v{first} to v{second} of {run}")
