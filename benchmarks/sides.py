"""Decode and sync of this checkout beside another one's, in turn on one machine.

    python benchmarks/sides.py --against DIR [--shape tiny] [--rows 1,8,32] [--turns 4] [--rounds 3] [--out FILE]

Each round starts a process of either side; each of its turns takes both sides there and back (A B B A). `ratio` is the
median over such pairs of this side's seconds by the other's, with the quartiles: `wall` of the clock, `cpu` of the
processor, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PROMPT, TOKENS, RANK = 64, 24, 16
KINDS = ("wall", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--rows", default="1,8,32", help="completions of each decode")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _answer(options.side)
        return
    from lora_grpo.bench.provenance import provenance
    from lora_grpo.bench.shapes import write_model

    work = [*(f"decode {rows}" for rows in options.rows.split(",")), "sync"]
    pairs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in work}
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_model(options.shape, Path(folder) / "model"))
        for number in range(options.rounds):
            _round(options, model, pairs, reverse=bool(number % 2))
    git = ["git", "-C", str(options.against), "describe", "--always", "--exclude=*", "--dirty=+"]
    against = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    result = {**provenance("benchmarks/sides.py"), "against": against, "work": {n: _said(p) for n, p in pairs.items()}}
    result["command"] = result["command"].replace(str(options.against), "DIR")
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


def _round(options: argparse.Namespace, model: str, pairs: dict[str, list[Any]], *, reverse: bool) -> None:
    places = [HERE.parent.parent, options.against.resolve()]
    sides = [_started(place, model) for place in places]
    order = [1, 0] if reverse else [0, 1]
    try:
        for turn in range(options.turns + 1):
            for name, found in pairs.items():
                for there in (order, order[::-1]):
                    taken = {side: _ask(sides[side], name) for side in there}
                    if turn:  # the first one warms up
                        found.append([taken[0], taken[1]])
    finally:
        for side in sides:
            assert side.stdin is not None
            side.stdin.close()
            side.wait()


def _started(repository: Path, model: str) -> subprocess.Popen[str]:
    settings = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment = {**settings, **os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE), "--side", model]
    pipe = subprocess.PIPE
    side = subprocess.Popen(command, env=environment, cwd=repository, stdin=pipe, stdout=pipe, text=True)
    assert side.stdout is not None
    assert json.loads(side.stdout.readline()) == {"from": str(repository)}
    return side


def _ask(side: subprocess.Popen[str], name: str) -> dict[str, float]:
    assert side.stdin is not None
    assert side.stdout is not None
    print(name, file=side.stdin, flush=True)
    answer: dict[str, float] = json.loads(side.stdout.readline())
    return answer


def _said(pairs: list[list[dict[str, float]]]) -> dict[str, Any]:
    said: dict[str, Any] = {"pairs": len(pairs)}
    for kind in KINDS:
        low, middle, high = statistics.quantiles([own[kind] / other[kind] for own, other in pairs], n=4)
        seconds = [round(statistics.median(pair[side][kind] for pair in pairs), 5) for side in (0, 1)]
        quartiles = [round(low, 3), round(high, 3)]
        said[kind] = {"ratio": round(middle, 3), "quartiles": quartiles, "seconds": seconds}
    return said


def _answer(model: str) -> None:
    """One side: does what its lines on stdin say. Only names that both checkouts have are used."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import lora_grpo
    from lora_grpo import AdapterStore, NativeSync, Sampling, VLLMEngine

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    policy = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    settings: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 64, "gpu_memory_utilization": 0.1}
    engine = VLLMEngine(model, max_lora_rank=RANK, dtype="bfloat16", enforce_eager=True, **settings)
    generator = torch.Generator().manual_seed(0)

    def refill() -> None:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02, generator=generator)

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, AdapterStore(Path(folder) / "store") as store:
        sync = NativeSync(policy, engine, store)
        refill()
        version = sync.push(step=0)
        print(json.dumps({"from": str(Path(lora_grpo.__file__).parent.parent)}), file=out, flush=True)
        for step, line in enumerate(sys.stdin, start=1):
            what, *rows = line.split()
            refill()
            drawn = torch.randint(1, base.config.vocab_size, (int(rows[0]) if rows else 1, PROMPT), generator=generator)
            sampling = Sampling(n=1, max_tokens=TOKENS, seed=step, ignore_eos=True)
            prompts = drawn.tolist()
            wall, cpu = time.perf_counter(), time.process_time()
            if what == "sync":
                version = sync.push(step=step)
            else:
                engine.generate(prompts, sampling, adapter=version)
            seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            print(json.dumps(seconds), file=out, flush=True)
        sync.close()
    engine.close()


if __name__ == "__main__":
    main()
