"""Peak memory and processor time of the trainer's part of a step, beside TRL's and beside the model without its head.

    python benchmarks/trainer.py [--tokens 512,1024] [--dtype float32] [--against DIR] [--out FILE]
    python benchmarks/trainer.py --prompt 2048 --tokens 512 --shape 0.5b-4-layers --dtype float32 \
        --subjects ours,padded,packed-backbone,backbone

One rollout is one update. `ours` is everything that a step computes of it: old log-probs, loss and backward,
optimizer. `trl` is the loss and backward of TRL's own GRPOTrainer, and `backbone` the model up to its last hidden
state, forward and backward: what no output layer can undercut. `padded` and `backbone` compute the prompt once a
completion, `ours` and `packed-backbone` once a group where that pays. `canary` is the trainer's part of a canary on 32
such rows, and `estimate` what is said of the step before it starts. DIR is another checkout of this repository; its
trainer is `against`. Each figure is of a process of its own, with one thread unless OMP_NUM_THREADS is set: CPU
seconds, and the peak of its memory above the level before. What tensors give back goes back to the system at once
(MALLOC_MMAP_THRESHOLD_), or the peak would hold what glibc's heap keeps. Ratios are of figures of one call.

On a GPU (`--device cuda:0`) subjects take turns in one process: seconds of the clock, for a step after two that warmed
up, and the peak of what torch has allocated. What does not fit the card has no figures.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).resolve()
VOCABULARY = 151_936
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "small": ("qwen2.5-0.5b", SMALL),
    "0.5b-4-layers": ("qwen2.5-0.5b", {"num_hidden_layers": 4}),
    "0.5b": ("qwen2.5-0.5b", {}),
    "7b": ("qwen2.5-7b", {}),
}
"""A released model's shape, and what is changed of it."""
SUBJECTS = ("ours", "estimate", "canary", "trl", "backbone")
CANARY_ROWS = 32


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_measured(options)))
        return
    table = []
    for tokens in options.tokens:
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.repeat):
            for subject in options.subjects or [*SUBJECTS, *(["against"] if options.against else [])]:
                measure = _in_a_process if options.device == "cpu" else _in_turn
                found.setdefault(subject, []).append(measure(options, subject, tokens))
        for subject, rows in found.items():
            row = {name: statistics.median(one[name] for one in rows) for name in rows[0]}
            table.append({"tokens": tokens, "subject": subject, **row})
            print(f"T={tokens:<6}{subject:<16}{_told(row)}", flush=True)
        if options.out:
            _write(options, table)


def _told(row: dict[str, float]) -> str:
    return "  ".join(f"{value:,.3f} {name.rpartition('_')[2]}" for name, value in row.items()) or "does not fit"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=lambda text: [int(one) for one in text.split(",")], default=[512, 1024])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--rows", type=int, default=8, help="completions: one group, one micro-batch")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--checkpointing", choices=("on", "off"), default="off", help="of activations")
    asked = f"{', '.join(SUBJECTS)} (these by default), padded, packed-backbone, against"
    parser.add_argument("--subjects", type=lambda text: text.split(","), help=asked)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--out", type=Path, help="a JSON file of the table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_turn(options: argparse.Namespace, subject: str, tokens: int) -> dict[str, float]:
    """In this process; empty where the card's memory does not hold it."""
    asked = argparse.Namespace(**{**vars(options), "measure": subject, "tokens": [tokens]})
    try:
        return _measured(asked)
    except torch.cuda.OutOfMemoryError as error:
        print(f"{subject}, {tokens} tokens: {error}", file=sys.stderr)
        return {}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _in_a_process(options: argparse.Namespace, subject: str, tokens: int) -> dict[str, float]:
    repository = options.against.resolve() if subject == "against" else HERE.parent.parent
    command = [sys.executable, str(HERE), *sys.argv[1:], "--measure", subject, "--tokens", str(tokens)]
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    environment = {**settings, **os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(options: argparse.Namespace) -> dict[str, float]:
    model = _model(options)
    ids_BL = torch.randint(5, VOCABULARY, (options.rows, options.prompt + options.tokens[0]))
    ids_BL[:, : options.prompt] = ids_BL[0, : options.prompt].clone()
    if options.measure == "estimate":
        return _estimate(model, options)
    ours = {"ours": _ours, "padded": _padded, "against": _ours, "canary": _canary}
    if options.measure in ours:
        return _peak_and_time(ours[options.measure](model, ids_BL, options), options.device)
    # Only here: `against` finds another checkout's package by this name.
    from benchmarks import trainer_beside as beside

    others = {"trl": beside.trl, "backbone": beside.backbone, "packed-backbone": beside.packed_backbone}
    return _peak_and_time(others[options.measure](model, ids_BL, options), options.device)


def _model(options: argparse.Namespace) -> Any:
    """The same weights for every subject."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_grpo.bench.shapes import shape_config

    name, changed = SHAPES[options.shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape_config(name), **changed})
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    if options.measure == "trl":
        return model
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if options.checkpointing == "on" and "backbone" in options.measure:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _ours(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    from lora_grpo.grpo.batch import Batch
    from lora_grpo.grpo_config import GRPOConfig
    from lora_grpo.policy import Policy
    from lora_grpo.types import Completion, Group

    config = GRPOConfig(
        num_generations=options.rows,
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=1,
        max_completion_length=options.tokens[0],
        gradient_checkpointing=options.checkpointing == "on",
        vllm_importance_sampling_correction=False,  # nobody has sampled these completions
    )
    prompt, rows = ids_BL[0, : options.prompt].tolist(), ids_BL[:, options.prompt :].tolist()
    made = tuple(Completion("", tuple(row), (-12.0,) * len(row), "length", 1) for row in rows)
    # An earlier version of this package asked for it.
    padding = {"pad_token_id": 0} if "pad_token_id" in inspect.signature(Batch.from_groups).parameters else {}
    batch = Batch.from_groups([Group("", tuple(prompt), made)], torch.linspace(-1, 1, len(rows)), **padding)
    policy = Policy(model, config)
    policy.logprobs(batch.select(torch.arange(2)))  # how a model is given its rows is found out once a run
    return lambda: policy.update(batch)


def _padded(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    step = _ours(model, ids_BL, options)
    return patch("lora_grpo.grpo.packing.pays", lambda _: False)(step)


def _canary(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    from lora_grpo.canary import take_canary
    from lora_grpo.engines.fake import FakeEngine
    from lora_grpo.types import Completion

    _ours(model, ids_BL, options)  # after it the model is known to take packed rows, as in a run
    prompt = ids_BL[0, : options.prompt].tolist()
    rows = ids_BL[:, options.prompt :].tolist() * (CANARY_ROWS // options.rows)
    pairs = [(prompt, Completion("", tuple(row), (-12.0,) * len(row), "length", 1)) for row in rows]
    limits = {"batch_rows": options.rows, "known_noise": 99.0, "most_noise": 99.0}
    return lambda: take_canary(model, FakeEngine(lambda _: ""), pairs, nullcontext(), 1.0, **limits)


def _estimate(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """What the step's activations are said to take, and the time it takes to say so."""
    from lora_grpo.config import EngineConfig
    from lora_grpo.trainer.activations import LargestBatch
    from lora_grpo.trainer.memory import estimate

    engine = EngineConfig(urls=("http://elsewhere",))
    batch = LargestBatch(options.rows, options.prompt, options.tokens[0], group=options.rows)
    started = time.process_time()
    needed = estimate(model, None, engine, batch, False, options.checkpointing == "on")
    seconds = time.process_time() - started
    return {"peak_mib": (needed.activations_bytes or 0) / 2**20, "cpu_s": seconds}


def _peak_and_time(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Of one step: on a CPU the first; on a GPU the third, without what a first one compiles and keeps, or the first
    two of a policy look at besides."""
    if device != "cpu":
        step()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20, "seconds": seconds}
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status_kib("VmRSS"), time.process_time()
    step()
    seconds = time.process_time() - started
    return {"peak_mib": (_status_kib("VmHWM") - before) / 1024, "cpu_s": seconds}


def _status_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def _write(options: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    """The table, and where it comes from, the other checkout's commit included."""
    from lora_grpo.bench.provenance import provenance, write_result

    origin = provenance("benchmarks/trainer.py", device=options.device) | {"trl": importlib.metadata.version("trl")}
    origin["machine"]["threads"] = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if options.against:
        asked = ["git", "-C", str(options.against), "describe", "--always", "--exclude=*", "--dirty=+"]
        origin["against"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    write_result(options.out, {**origin, "rows": table})


if __name__ == "__main__":
    main()
