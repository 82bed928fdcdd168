"""`lora-grpo diff RUN A B`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lora_grpo.cli.live import Json, Run
from lora_grpo.cli.output import print_json, print_table


def diff(
    run: Run,
    first: Annotated[int, typer.Argument(metavar="A", min=1, help="A version's number.")],
    second: Annotated[int, typer.Argument(metavar="B", min=1, help="Another one's.")],
    as_json: Json = False,
) -> None:
    """How far two versions are apart in what they add to the base, W = B A (scaling included), module by module.

    change is |W_b - W_a| / |W_a| in the Frobenius norm, cosine <W_a, W_b> / (|W_a| |W_b|); 'all' joins all modules.
    """
    from lora_grpo.adapters.difference import difference
    from lora_grpo.adapters.store import AdapterStore

    with AdapterStore(archive=run, readonly=True) as store:
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
