"""What a population takes beside a run alone, on a 0.5B shape: memory at its peak, and publishing with its proof.

    python -m benchmarks.population_costs [--members 8] [--shape qwen2.5-0.5b] [--steps 2] [--repeats 5] [--out FILE]

Two processes, a run alone and a population of such runs, train one after the other and then publish in turn. A peak is
that of the resident set (VmHWM; of a process and all that it started, summed, which is no less than their peak
together) with what lies on tmpfs then. `most_bytes` is 1.3 times the run alone, each member's adapter with optimizer
and slot, and what the rows of a round take of the KV cache, the last three as the estimate has them. `publish` has the
seconds until all versions of a step are proven and promoted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from peft import LoraConfig

from lora_grpo import GRPOConfig, GRPOTrainer, MemberSpec, Population
from lora_grpo.bench.provenance import provenance
from lora_grpo.bench.shapes import write_model
from lora_grpo.config import EngineConfig, ModelConfig

ROWS = [{"prompt": f"{number:03d} is a number, and the next is "} for number in range(64)]
ENGINE = EngineConfig(max_model_len=64, max_num_seqs=64, enforce_eager=True)
ANSWER, ALLOWED = "answer: ", 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of the publishing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", nargs=2, metavar=("DISK", "TMPFS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        runs(*map(Path, options.inside), options.members, options.steps)
        return
    about = provenance("-m", "benchmarks.population_costs")
    with ExitStack() as stack:
        disk = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-costs-"))
        tmpfs = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-costs-", dir="/dev/shm"))
        write_model(options.shape, Path(disk) / "base")
        children, found = {}, {}
        publish: dict[str, list[float]] = {"alone": [], "population": []}
        for name, members in (("alone", 1), ("population", options.members)):
            command = [sys.executable, "-m", "benchmarks.population_costs", "--inside", disk, tmpfs]
            command += ["--members", str(members), "--steps", str(options.steps)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            children[name] = stack.enter_context(child)
            found[name] = answer(child.stdout)
            print(name, json.dumps(found[name]), flush=True)
        for _ in range(options.repeats):
            for name, child in children.items():
                print("again", file=child.stdin, flush=True)
                publish[name].append(answer(child.stdout)["seconds"])
    most_bytes = int(ALLOWED * found["alone"]["peak_bytes"]) + sum(found["population"]["estimate"].values())
    median_s = {name: statistics.median(seconds) for name, seconds in publish.items()}
    ratio = median_s["population"] / (options.members * median_s["alone"])
    result = {
        "shape": options.shape,
        "members": options.members,
        "memory": {**found, "most_bytes": most_bytes, "holds": found["population"]["peak_bytes"] <= most_bytes},
        "publish": {"seconds": publish, "median_s": median_s, "ratio": round(ratio, 3)},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps({**about, **result}, indent=1) + "\n")


def answer(said: IO[str] | None) -> dict[str, Any]:
    for line in said or ():
        if line.startswith(ANSWER):
            return dict(json.loads(line.removeprefix(ANSWER)))
    raise RuntimeError("the process ended")


def runs(disk: Path, tmpfs: Path, members: int, steps: int) -> None:
    """Inside a process: train, say what it took, and publish as often as asked."""
    model, estimate = ModelConfig(name=str(disk / "base")), {}
    specs = [spec(disk, tmpfs, f"{number}-of-{members}", seed=number, steps=steps) for number in range(members)]
    with ExitStack() as stack:
        if members == 1:
            trainers = [GRPOTrainer(model, **specs[0].arguments(), engine_config=ENGINE, view=False)]
            stack.enter_context(trainers[0]).train()
        else:
            population = stack.enter_context(Population(model, specs, engine_config=ENGINE))
            trainers = [member.runs for member in population.train()]
            memory = population.room.memory
            estimate = {
                "adapters_and_optimizers_bytes": memory.adapter_and_optimizer_bytes,
                "slots_bytes": memory.adapter_slots_bytes,
                "kv_bytes": population.room.joint_kv_bytes,
            }
        on_tmpfs = sum(file.stat().st_size for file in tmpfs.glob(f"*-of-{members}/**/*") if file.is_file())
        peaks = {"peak_bytes": resident_peak() + on_tmpfs, "of_it_tmpfs_bytes": on_tmpfs}
        print(f"{ANSWER}{json.dumps({**peaks, 'estimate': estimate})}", flush=True)
        for _ in sys.stdin:
            print(f"{ANSWER}{json.dumps({'seconds': sum(map(published, trainers))})}", flush=True)


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
def published(trainer: GRPOTrainer) -> float:
    """Seconds that it took, the weights being others than before."""
    for parameter in trainer.policy.parameters.values():
        parameter += 1e-3 * torch.randn_like(parameter)
    trainer.sync.push(trainer.steps_done)
    assert trainer.sync.last_receipt is not None
    return trainer.sync.last_receipt.total_s


def resident_peak(process: str = "self") -> int:
    """Bytes; of a process and all that it started."""
    here = Path("/proc") / process
    status = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines() if ":" in line)
    children = [pid for task in (here / "task").iterdir() for pid in (task / "children").read_text().split()]
    return (int(status["VmHWM"].split()[0]) << 10) + sum(map(resident_peak, children))


if __name__ == "__main__":
    main()
