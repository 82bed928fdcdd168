"""The demo's task in several ways, one training after the other: on a base in fewer bits, or sampling ahead.

    python -m benchmarks.variants [--variants plain,nf4,fp8,w4a16] [--seeds 1] [--steps 30] [--out FILE]
    python -m benchmarks.variants --variants 0,1,2,2,1,0 --out FILE

The base is made on the spot as the demo's is, in sizes that blocks of 128 fit. `nf4` is that checkpoint with [model]
quantization = "nf4"; `fp8` and `w4a16` are quantized copies of it. A number is `max_staleness`: there and back, so that
a machine that warms up or slows down favours none. Accuracy is the share of 512 held-out problems that the greedy
answer of vLLM, with the adapter, solves. On a CPU trainer and engine compete for the same cores, and with one thread
each (OMP_NUM_THREADS=1) a synchronous step leaves one of two idle: read the seconds with `cores_used` (CPU seconds a
second) beside them. Prints a JSON line a training, and the medians of each variant.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_grpo.bench.provenance import asked, provenance, write_result
from lora_grpo.config import RunConfig
from lora_grpo.demo.base import BaseRecipe, ensure_base
from lora_grpo.demo.run import demo_config
from lora_grpo.errors import ConfigError
from lora_grpo.trainer import build_trainer
from tests.quantized import to_fp8, to_int4

RECIPE = BaseRecipe(hidden_size=128, intermediate_size=512, heads=4)
REWRITES: dict[str, Callable[[Path], Path]] = {"fp8": to_fp8, "w4a16": to_int4}
PHASES = {
    "step_s": "step_time",
    "wait_s": "time/generate_s",
    "reward_s": "time/reward_s",
    "train_s": "time/train_s",
    "publish_s": "time/publish_s",
}
WARM_UP_STEPS = 3
"""Steps at the start of each training that the phases leave out: the pipeline fills, caches are cold."""


def main() -> None:
    options = asked(__doc__, variants=f"plain,nf4,{','.join(REWRITES)}", seeds=1, steps=30, out=None)
    if options.steps <= WARM_UP_STEPS:
        raise ConfigError(f"--steps={options.steps} must be above {WARM_UP_STEPS}")
    about, rows = provenance("-m", "benchmarks.variants"), []
    for seed in range(options.seeds):
        for variant in options.variants.split(","):
            with tempfile.TemporaryDirectory(prefix="lora-grpo-variants-") as folder:
                found = trained(config_of(variant, seed, options.steps, Path(folder)))
            rows.append({"variant": variant, "seed": seed, **found})
            print(json.dumps(rows[-1]), flush=True)
    medians = {}
    for variant in options.variants.split(","):
        own = [row for row in rows if row["variant"] == variant]
        medians[variant] = {name: statistics.median(row[name] for row in own) for name in own[0] if name != "variant"}
    print(json.dumps(medians, indent=1))
    write_result(
        options.out, {**about, "base": asdict(RECIPE), "steps": options.steps, "medians": medians, "rows": rows}
    )


def config_of(variant: str, seed: int, steps: int, folder: Path) -> RunConfig:
    base = ensure_base(RECIPE)
    if variant in REWRITES:
        base = REWRITES[variant](Path(shutil.copytree(base, folder / "base")))
    config = demo_config(base, folder / "run", steps=steps, seed=seed)
    if variant == "nf4":
        return config.replace(model=config.model.replace(quantization="nf4"))
    if variant.isdigit():
        return config.replace(grpo=config.grpo.replace(max_staleness=int(variant), eval_every=None))
    if variant not in ("plain", *REWRITES):
        raise ConfigError(f"--variants: {variant!r} is none of plain, nf4, {', '.join(REWRITES)} and no number")
    return config


def trained(config: RunConfig) -> dict[str, Any]:
    """What one run reached and how far apart trainer and sampler were; of the phases, medians."""
    with build_trainer(config, view=False) as trainer:
        started, busy = time.perf_counter(), time.process_time()
        result = trainer.train()
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        match = trainer.sync.base_match
    history = trainer.history
    return {
        "accuracy_before": result["reward_before"],
        "accuracy_after": result["reward_after"],
        "logprob_gap_mean": result["logprob_gap_mean"],
        "tensors_compared": match.compared,
        "tensors_quantized": match.quantized,
        "seconds": seconds,
        "cores_used": busy / seconds,
        **{name: statistics.median(metrics[of] for metrics in history[WARM_UP_STEPS:]) for name, of in PHASES.items()},
        "lag": statistics.fmean(metrics.get("sample/staleness_mean", 0.0) for metrics in history),
        "most_lag": max(metrics.get("sample/staleness_max", 0.0) for metrics in history),
        **{name: result.get(name, 0) for name in ("dropped_stale", "dropped_rollback")},
    }


if __name__ == "__main__":
    main()
