"""The demo's task on one small base, plain and in fewer bits: what thirty steps of training reach on each.

    python -m benchmarks.quantized [--seeds 3] [--steps 30] [--schemes plain,nf4,fp8,w4a16] [--out FILE]

The base is made on the spot as the demo's is, in sizes that blocks of 128 fit. `nf4` is that checkpoint with [model]
quantization = "nf4"; `fp8` and `w4a16` are quantized copies of it. Accuracy is the share of 512 held-out problems that
the greedy answer of vLLM, with the adapter, solves; `apart` is a scheme's mean accuracy less the plain base's.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_grpo.bench.provenance import asked, provenance, write_result
from lora_grpo.demo.base import BaseRecipe, ensure_base
from lora_grpo.demo.run import demo_config
from lora_grpo.trainer import build_trainer
from tests.quantized import to_fp8, to_int4

RECIPE = BaseRecipe(hidden_size=128, intermediate_size=512, heads=4)
REWRITES: dict[str, Callable[[Path], Path] | None] = {"plain": None, "nf4": None, "fp8": to_fp8, "w4a16": to_int4}


def main() -> None:
    options = asked(__doc__, seeds=3, steps=30, schemes=",".join(REWRITES), out=None)
    about, rows = provenance("-m", "benchmarks.quantized"), []
    for seed in range(options.seeds):
        for scheme in options.schemes.split(","):
            with tempfile.TemporaryDirectory(prefix="lora-grpo-quantized-") as folder:
                rows.append({"scheme": scheme, "seed": seed, **trained(scheme, seed, options.steps, Path(folder))})
            print(json.dumps(rows[-1]), flush=True)
    result = {"base": asdict(RECIPE), "steps": options.steps, "means": means(rows), "rows": rows}
    print(json.dumps(result["means"], indent=1))
    write_result(options.out, {**about, **result})


def trained(scheme: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """What one run reached, and how far apart trainer and sampler were."""
    base, rewrite = ensure_base(RECIPE), REWRITES[scheme]
    if rewrite is not None:
        base = rewrite(Path(shutil.copytree(base, folder / "base")))
    config = demo_config(base, folder / "run", steps=steps, seed=seed)
    if scheme == "nf4":
        config = config.replace(model=config.model.replace(quantization="nf4"))
    with build_trainer(config) as trainer:
        result, match, probe = trainer.train(), trainer.sync.base_match, trainer.sync.probe
    return {
        "accuracy_before": result["reward_before"],
        "accuracy_after": result["reward_after"],
        "logprob_gap_mean": result["logprob_gap_mean"],
        "seconds": result["seconds"],
        "tensors": [match.compared, match.tensors, match.quantized],
        "probe": asdict(probe),
    }


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each scheme over its seeds."""
    found: dict[str, dict[str, float]] = {}
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = [row for row in rows if row["scheme"] == scheme]
        names = ("accuracy_before", "accuracy_after", "logprob_gap_mean", "seconds")
        found[scheme] = {name: statistics.fmean(row[name] for row in own) for name in names}
    plain = found.get("plain", {}).get("accuracy_after")
    for scheme, values in found.items():
        if plain is not None and scheme != "plain":
            values["apart"] = values["accuracy_after"] - plain
    return found


if __name__ == "__main__":
    main()
