"""The demo's task at eight learning rates: as one population, one run after the other, and eight processes at once.

    python -m benchmarks.rates [--steps 30] [--rates 5e-4,1e-3,...] [--lone 8] [--device cpu] --out FOLDER

Each is what a user would start: processes of their own, engines included. `wall_s` is from start to end, `generation_s`
what the engines took in all steps, `peak_mib` the most that all processes of a kind held at a time (PSS: what processes
share is counted once). `same` says for each rate whether all versions of the member are its lone run's, to the bit.
FOLDER gets `rates.json` and the curves as the sweep draws them. Eight processes at once have one thread each. With
fewer lone runs than rates, these are the first rates', and no processes run at once. On a GPU the engine computes in
the base's dtype, and a row is not the same to the bit in every batch."""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil

from lora_grpo import AdapterStore
from lora_grpo.bench.host import asked, provenance, write_result
from lora_grpo.demo import demo_config, ensure_base
from lora_grpo.metrics.log import read_metrics
from lora_grpo.trainer import build_trainer
from lora_grpo.trainer.sweeping.plan import SweepPlan, trials_of
from lora_grpo.trainer.sweeping.sweep import Sweep

RATES = "2.5e-4,5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2"
LOOK_EVERY_S = 0.5


def main() -> None:
    options = asked(__doc__, steps=30, rates=RATES, lone=8, device="cpu", out=Path)
    about, rates = provenance("-m", "benchmarks.rates", device=options.device), options.rates.split(",")
    measured = partial(processes, steps=options.steps, device=options.device)
    ensure_base()
    with tempfile.TemporaryDirectory(prefix="lora-grpo-rates-") as name:
        folder = Path(name)
        together = measured([options.rates], folder / "together")
        members = {rate: next((folder / "together").glob(f"{at}_*")) for at, rate in enumerate(rates)}
        # Members generate in one batch, which each of them notes.
        found = {"population": {**together, "generation_s": generation_s(members[rates[0]])}}
        lone = [measured([rate], folder / "alone") for rate in rates[: options.lone]]
        runs = {rate: folder / "alone" / rate for rate in rates[: options.lone]}
        found["one after the other"] = {
            "wall_s": sum(one["wall_s"] for one in lone),
            "peak_mib": max(one["peak_mib"] for one in lone),
            "generation_s": sum(map(generation_s, runs.values())),
        }
        summary = folder / "together" / "summary.json"
        if len(runs) == len(rates):
            at_once = measured(rates, folder / "at-once")
            slowest = max(generation_s(folder / "at-once" / rate) for rate in rates)
            found["processes at once"] = {**at_once, "generation_s": slowest}
        result = {
            **about,
            "steps": options.steps,
            "found": {name: {what: round(value, 1) for what, value in of.items()} for name, of in found.items()},
            "held_out": {row["member"]: row["held_out"] for row in json.loads(summary.read_text())["members"]},
            "same": {rate: digests(members[rate]) == digests(runs[rate]) for rate in runs},
        }
        write_result(options.out / "rates.json", result)
        shutil.copy(folder / "together" / "curves.png", options.out)
    print(json.dumps(result["found"], indent=1), result["held_out"], result["same"])


def train(directory: Path, rates: str, steps: int, device: str) -> None:
    """One rate as a run, several as a population; on a CPU in fp32, where a row is the same in whatever batch it is."""
    config = demo_config(ensure_base(), directory.with_name(f"{directory.name}-data"), steps=steps, seed=0)
    engine = config.engine.replace(dtype="float32") if device == "cpu" else config.engine
    config = config.replace(output_dir=str(directory), engine=engine)
    if "," in rates:
        Sweep(SweepPlan(settings=config, trials=trials_of([f"grpo.learning_rate={rates}"]))).run()
        return
    with build_trainer(config.replace(grpo=config.grpo.replace(learning_rate=float(rates)))) as trainer:
        trainer.train()


def processes(rates: Sequence[str], folder: Path, steps: int, device: str) -> dict[str, float]:
    """A process for each of `rates`, all at once: seconds until the last ends, and the most that they held."""
    spawned = multiprocessing.get_context("spawn").Process
    given = [(folder if "," in rate else folder / rate, rate, steps, device) for rate in rates]
    running = [spawned(target=train, args=one) for one in given]
    started, peak_bytes = time.perf_counter(), 0
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"} if len(rates) > 1 else {}):
        for process in running:
            process.start()
    while any(process.is_alive() for process in running):
        peak_bytes = max(peak_bytes, sum(_held_bytes(process.pid) for process in running))
        time.sleep(LOOK_EVERY_S)
    if any(process.exitcode for process in running):
        raise SystemExit(f"a run failed; what it said: {folder}")
    return {"wall_s": time.perf_counter() - started, "peak_mib": peak_bytes / 2**20}


def _held_bytes(pid: int | None) -> int:
    try:
        first = psutil.Process(pid)
        return sum(int(one.memory_full_info().pss) for one in (first, *first.children(recursive=True)))
    except psutil.Error:
        return 0


def generation_s(run: Path) -> float:
    return sum(float(record["time/generate_s"]) for record in read_metrics(run) if record["event"] == "step")


def digests(run: Path) -> list[tuple[int, str]]:
    with AdapterStore(archive=run, readonly=True) as store:
        return [(number, store.get(number).digest) for number in store.numbers]


if __name__ == "__main__":
    main()
