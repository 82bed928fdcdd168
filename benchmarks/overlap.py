"""Synchronous training against sampling ahead: seconds a step and the accuracy reached, on the demo's task, in one run.

    python benchmarks/overlap.py [--order 012210] [--steps 30]

`--order` names the `max_staleness` of each training in turn: there and back, so that a machine that warms up or slows
down favours none. All share one engine (as large as the largest needs) and start from the same adapter. On a CPU
trainer and engine compete for the same cores, and with one thread each (OMP_NUM_THREADS=1) a synchronous step leaves
one of two cores idle: read the seconds with threads and cores used (CPU seconds a second) beside them. Prints a line
a training, and as the last line of stdout one JSON object: command, commit, machine (with its cores and threads) and
the medians over the trainings of each `max_staleness`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_grpo.bench.provenance import provenance
from lora_grpo.config import ModelConfig, RunConfig
from lora_grpo.data import load_data
from lora_grpo.demo.base import ensure_base
from lora_grpo.demo.run import demo_config
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.rewards import load_reward
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.assembly import with_room
from lora_grpo.trainer.build import effective_grpo, lora_config
from lora_grpo.trainer.models import build_engine

TABLE = "{:>13} {:>8.8} {:>8.8} {:>8.8} {:>6.6} {:>6.6} {:>8.8} {:>8.8}"
WARM_UP_STEPS = 3
"""Steps at the start of each training that the seconds leave out: the pipeline fills, caches are cold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", default="012210", help="max_staleness of each training, a digit each")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    if not arguments.order.isdigit() or arguments.steps <= WARM_UP_STEPS:
        raise ConfigError(f"--order={arguments.order} must be digits, --steps above {WARM_UP_STEPS}")
    about, rows = provenance("benchmarks/overlap.py"), defaultdict[int, list[dict[str, float]]](list)
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(ensure_base(), Path(folder) / "demo", steps=arguments.steps, seed=0)
        most = max(map(int, arguments.order))
        engine = build_engine(config.model, with_room(config.engine, most), config.lora.largest_rank)
        train(config, engine, Path(folder) / "warm-up", most, steps=WARM_UP_STEPS)
        print(TABLE.format("max_staleness", "step s", "wait s", "train s", "lag", "cores", "accuracy", ""))
        for index, digit in enumerate(arguments.order):
            row = train(config, engine, Path(folder) / f"run{index}", int(digit), steps=arguments.steps)
            rows[int(digit)].append(row)
            shown = [row[name] for name in ("step_s", "wait_s", "train_s", "lag", "cores_used")]
            print(TABLE.format(digit, *shown, row["accuracy_before"], row["accuracy_after"]), flush=True)
        engine.close()
    report(rows, arguments.steps, arguments.order, about)


def train(config: RunConfig, engine: Engine, run: Path, most: int, *, steps: int) -> dict[str, float]:
    """One training; medians of seconds over the steps after the warm-up, and means over the whole."""
    data, held_out = load_data(config.data)
    with GRPOTrainer(
        ModelConfig(**config.model.model_dump()),
        [load_reward(reward) for reward in config.rewards],
        effective_grpo(config).replace(max_staleness=most, total_steps=steps, eval_every=None),
        data,
        eval_dataset=held_out,
        peft_config=lora_config(config.lora),
        engine=engine,
        run_dir=run,
        view=False,
    ) as trainer:
        started, busy = time.perf_counter(), time.process_time()
        result = trainer.train()
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        return {**of_history(trainer.history), **of_result(result), "cores_used": round(busy / seconds, 3)}


def of_history(history: list[Mapping[str, Any]]) -> dict[str, float]:
    settled = history[WARM_UP_STEPS:] or history

    def median(name: str) -> float:
        return round(statistics.median(metrics[name] for metrics in settled), 5)

    return {
        "step_s": median("step_time"),
        "wait_s": median("time/generate_s"),
        "reward_s": median("time/reward_s"),
        "train_s": median("time/train_s"),
        "publish_s": median("time/publish_s"),
        "steps_s": round(sum(metrics["step_time"] for metrics in history), 3),
        "lag": round(statistics.fmean(metrics.get("sample/staleness_mean", 0.0) for metrics in history), 3),
        "most_lag": max(metrics.get("sample/staleness_max", 0.0) for metrics in history),
    }


def of_result(result: Mapping[str, Any]) -> dict[str, float]:
    names = ("accuracy_before", "accuracy_after", "logprob_gap_mean", "dropped_stale", "dropped_rollback")
    found = {**result, "accuracy_before": result["reward_before"], "accuracy_after": result["reward_after"]}
    return {name: round(float(found.get(name, 0)), 5) for name in names}


def report(rows: Mapping[int, list[dict[str, float]]], steps: int, order: str, about: Mapping[str, Any]) -> None:
    medians = {
        str(most): {name: statistics.median(row[name] for row in found) for name in found[0]}
        for most, found in sorted(rows.items())
    }
    print(
        json.dumps(
            {
                **about,
                "steps": steps,
                "order": order,
                "max_staleness": medians,
                "accuracy_after": {str(most): [row["accuracy_after"] for row in found] for most, found in rows.items()},
                "step_s": {str(most): [row["step_s"] for row in found] for most, found in rows.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
