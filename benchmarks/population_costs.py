"""What a population takes beside a run alone, on a 0.5B shape: memory at its peak, and publishing with its proof.

    python -m benchmarks.population_costs [--members 8] [--shape qwen2.5-0.5b] [--steps 2] [--repeats 5] [--out FILE]

Two processes, a run alone and a population of such runs, train one after the other and then publish in turn. A peak is
that of the resident set (VmHWM; of a process and all that it started, summed, which is no less than their peak
together) with what lies on tmpfs then. `most_bytes` is 1.3 times the run alone, each member's adapter with optimizer
and slot, and what the rows of a round take of the KV cache, the last three as the estimate has them. `publish` has the
seconds until all versions of a step are proven and promoted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig

from lora_grpo import GRPOConfig, GRPOTrainer, MemberSpec, Population
from lora_grpo.bench.gauges import proc_bytes
from lora_grpo.bench.provenance import asked, provenance, write_result
from lora_grpo.bench.shapes import write_model
from lora_grpo.config import EngineConfig, ModelConfig

ROWS = [{"prompt": f"{number:03d} is a number, and the next is "} for number in range(64)]
ENGINE = EngineConfig(max_model_len=64, max_num_seqs=64, enforce_eager=True)
ALLOWED = 1.3
TRAINERS: list[GRPOTrainer] = []
"""Of a process of its own, which ends with them."""


def main() -> None:
    options = asked(__doc__, members=8, shape="qwen2.5-0.5b", steps=2, repeats=5, out=None)
    about, workers, found = provenance("-m", "benchmarks.population_costs"), {}, {}
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-costs-")))
        tmpfs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-costs-", dir="/dev/shm")))
        write_model(options.shape, disk / "base")
        for name, members in (("alone", 1), ("population", options.members)):
            workers[name] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            found[name] = workers[name].submit(train, disk, tmpfs, members, options.steps).result()
            print(name, json.dumps(found[name]), flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(options.repeats):
            for name, worker in workers.items():
                seconds[name].append(worker.submit(publish).result())
    most_bytes = int(ALLOWED * found["alone"]["peak_bytes"]) + sum(found["population"]["estimate"].values())
    median_s = {name: statistics.median(of) for name, of in seconds.items()}
    ratio = median_s["population"] / (options.members * median_s["alone"])
    result = {
        "shape": options.shape,
        "members": options.members,
        "memory": {**found, "most_bytes": most_bytes, "holds": found["population"]["peak_bytes"] <= most_bytes},
        "publish": {"seconds": seconds, "median_s": median_s, "ratio": round(ratio, 3)},
    }
    print(json.dumps(result, indent=1))
    write_result(options.out, {**about, **result})


def train(disk: Path, tmpfs: Path, members: int, steps: int) -> dict[str, Any]:
    """In a process of its own: what it took."""
    model, estimate = ModelConfig(name=str(disk / "base")), {}
    specs = [spec(disk, tmpfs, f"{number}-of-{members}", seed=number, steps=steps) for number in range(members)]
    if members == 1:
        TRAINERS.append(GRPOTrainer(model, **specs[0].arguments(), engine_config=ENGINE, view=False))
        TRAINERS[0].train()
    else:
        population = Population(model, specs, engine_config=ENGINE)
        TRAINERS.extend(member.runs for member in population.train())
        memory = population.room.memory
        estimate = {
            "adapters_and_optimizers_bytes": memory.adapter_and_optimizer_bytes,
            "slots_bytes": memory.adapter_slots_bytes,
            "kv_bytes": population.room.joint_kv_bytes,
        }
    on_tmpfs = sum(file.stat().st_size for file in tmpfs.glob(f"*-of-{members}/**/*") if file.is_file())
    return {"peak_bytes": resident_peak() + on_tmpfs, "of_it_tmpfs_bytes": on_tmpfs, "estimate": estimate}


def spec(disk: Path, tmpfs: Path, name: str, *, seed: int, steps: int) -> MemberSpec:
    config = GRPOConfig(
        seed=seed,
        total_steps=steps,
        num_generations=2,
        generation_batch_size=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_completion_length=8,
        canary_every=1000,
    )
    lora = LoraConfig(r=16, target_modules="all-linear")
    return MemberSpec(disk / name, letters, config, ROWS, peft_config=lora, store_root=tmpfs / name)


def letters(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@torch.no_grad()
def publish() -> float:
    """Seconds that it takes, of all trainers of this process, whose weights are others than before."""
    for trainer in TRAINERS:
        for parameter in trainer.policy.parameters.values():
            parameter += 1e-3 * torch.randn_like(parameter)
        trainer.sync.push(trainer.steps_done)
    return sum(trainer.sync.last_receipt.total_s for trainer in TRAINERS)


def resident_peak() -> int:
    """Bytes; of this process and all that it started."""
    own = psutil.Process()
    return sum(proc_bytes(f"{one.pid}/status", "VmHWM")[0] for one in (own, *own.children(recursive=True)))


if __name__ == "__main__":
    main()
