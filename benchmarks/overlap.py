"""Synchronous training against sampling ahead: seconds a step and the accuracy reached, on the demo's task.

    python benchmarks/overlap.py [--order 012210] [--steps 30]

`--order` names the `max_staleness` of each training in turn: there and back, so that a machine that warms up or slows
down favours none. All start from the same adapter. On a CPU trainer and engine compete for the same cores, and with
one thread each (OMP_NUM_THREADS=1) a synchronous step leaves one of two cores idle: read the seconds with threads and
cores used (CPU seconds a second) beside them. Prints a line a training, and as the last line of stdout one JSON object:
command, commit, machine (with its cores and threads) and the medians over the trainings of each `max_staleness`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from lora_grpo.bench.provenance import asked, provenance
from lora_grpo.config import RunConfig
from lora_grpo.demo.base import ensure_base
from lora_grpo.demo.run import demo_config
from lora_grpo.errors import ConfigError
from lora_grpo.trainer import build_trainer

SHOWN = ("step_s", "wait_s", "train_s", "lag", "cores_used", "accuracy_before", "accuracy_after")
PHASES = {
    "step_s": "step_time",
    "wait_s": "time/generate_s",
    "reward_s": "time/reward_s",
    "train_s": "time/train_s",
    "publish_s": "time/publish_s",
}
WARM_UP_STEPS = 3
"""Steps at the start of each training that the seconds leave out: the pipeline fills, caches are cold."""


def main() -> None:
    arguments = asked(__doc__, order="012210", steps=30)
    if not arguments.order.isdigit() or arguments.steps <= WARM_UP_STEPS:
        raise ConfigError(f"--order={arguments.order} must be digits, --steps above {WARM_UP_STEPS}")
    about, rows = provenance("benchmarks/overlap.py"), defaultdict[str, list[dict[str, float]]](list)
    print(*(f"{name:>15}" for name in ("max_staleness", *SHOWN)))
    for most in arguments.order:
        with tempfile.TemporaryDirectory() as folder:
            config = demo_config(ensure_base(), Path(folder) / "demo", steps=arguments.steps, seed=0)
            row = trained(config.replace(grpo=config.grpo.replace(max_staleness=int(most), eval_every=None)))
        rows[most].append(row)
        print(*(f"{value:>15}" for value in (most, *(row[name] for name in SHOWN))), flush=True)
    medians = {
        most: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for most, found in sorted(rows.items())
    }
    single = {
        name: {most: [row[name] for row in found] for most, found in rows.items()}
        for name in ("accuracy_after", "step_s")
    }
    print(json.dumps({**about, **vars(arguments), "max_staleness": medians, **single}))


def trained(config: RunConfig) -> dict[str, float]:
    """One training; medians of seconds over the steps after the warm-up, and means over the whole."""
    with build_trainer(config, view=False) as trainer:
        started, busy = time.perf_counter(), time.process_time()
        result = trainer.train()
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    history = trainer.history
    found = {
        **{name: statistics.median(metrics[of] for metrics in history[WARM_UP_STEPS:]) for name, of in PHASES.items()},
        "steps_s": sum(metrics["step_time"] for metrics in history),
        "lag": statistics.fmean(metrics.get("sample/staleness_mean", 0.0) for metrics in history),
        "most_lag": max(metrics.get("sample/staleness_max", 0.0) for metrics in history),
        "accuracy_before": result["reward_before"],
        "accuracy_after": result["reward_after"],
        **{name: result.get(name, 0) for name in ("logprob_gap_mean", "dropped_stale", "dropped_rollback")},
        "cores_used": busy / seconds,
    }
    return {name: round(float(value), 5) for name, value in found.items()}


if __name__ == "__main__":
    main()
