"""Peak memory and processor time of the trainer's part of a step, beside TRL's and beside the model without its head.

    python -m benchmarks.trainer [--tokens 512,1024] [--dtype float32] [--repeat 1] [--out FILE]
    python -m benchmarks.trainer --prompt 2048 --tokens 512 --shape 0.5b-4-layers --dtype float32 \
        --subjects ours,padded,packed-backbone,backbone

One rollout is one update. `ours` is everything that a step computes of it: old log-probs, loss and backward,
optimizer. `trl` is the loss and backward of TRL's own GRPOTrainer, and `backbone` the model up to its last hidden
state, forward and backward: what no output layer can undercut. `padded` and `backbone` compute the prompt once a
completion, `ours` and `packed-backbone` once a group where that pays. `canary` is the trainer's part of a canary on 32
such rows, and `estimate` what is said of the step before it starts. The rows are one group and one micro-batch. Each
figure is of a process of its own, with one thread unless OMP_NUM_THREADS is set: CPU seconds, and the peak of its
memory above the level before, without what glibc's heap would keep (MALLOC_MMAP_THRESHOLD_).

On a GPU (`--device cuda:0`) subjects take turns in one process: seconds of the clock, for a step after two that warmed
up, and the peak of what torch has allocated. What does not fit the card has no figures."""

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.bench.gauges import Clock, collect, forget_peaks, level, peak
from lora_grpo.bench.host import asked, provenance, write_result
from lora_grpo.bench.shapes import shape_config
from lora_grpo.config import EngineConfig
from lora_grpo.engines.delivery.agreement import take_canary
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.packing import in_spans, pack
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.policy import Policy
from lora_grpo.trainer.checking import byte_tokenizer
from lora_grpo.trainer.memory import LargestBatch
from lora_grpo.trainer.room import estimate
from lora_grpo.types import Completion, Group

VOCABULARY, CANARY_ROWS = 151_936, 32
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {  # a released model's shape, and what is changed of it
    "small": ("qwen2.5-0.5b", SMALL),
    "0.5b-4-layers": ("qwen2.5-0.5b", {"num_hidden_layers": 4}),
    "0.5b": ("qwen2.5-0.5b", {}),
    "7b": ("qwen2.5-7b", {}),
}
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "HF_HUB_OFFLINE": "1"}


def main() -> None:
    sizes = {"tokens": "512,1024", "prompt": 64, "rows": 8, "shape": tuple(SHAPES), "dtype": ("bfloat16", "float32")}
    how = {"device": "cpu", "repeat": 1, "checkpointing": ("off", "on")}
    options = asked(__doc__, **sizes, **how, subjects="ours,estimate,canary,trl,backbone", out=None)
    os.environ.update({**SETTINGS, **os.environ})  # the processes in which a CPU is measured start with it
    about = provenance("-m", "benchmarks.trainer", device=options.device) | {"trl": importlib.metadata.version("trl")}
    about["machine"]["threads"] = int(os.environ["OMP_NUM_THREADS"])
    measure, table = _in_a_process if options.device == "cpu" else _in_turn, []
    for tokens in map(int, options.tokens.split(",")):
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.repeat):
            for subject in options.subjects.split(","):
                one = argparse.Namespace(**{**vars(options), "subject": subject, "tokens": tokens})
                found.setdefault(subject, []).append(measure(one))
        for subject, rows in found.items():
            row = {name: statistics.median(one[name] for one in rows) for name in rows[0]}
            table.append({"tokens": tokens, "subject": subject, **row})
            told = "  ".join(f"{value:,.3f} {name.rpartition('_')[2]}" for name, value in row.items())
            print(f"T={tokens:<6}{subject:<16}{told or 'does not fit'}", flush=True)
        write_result(options.out, {**about, "rows": table})


def _in_turn(options: argparse.Namespace) -> dict[str, float]:
    """In this process; empty where the card's memory does not hold it."""
    try:
        return _measured(options)
    except torch.cuda.OutOfMemoryError as error:
        print(f"{options.subject}, {options.tokens} tokens: {error}", file=sys.stderr)
        return {}
    finally:
        collect(options.device)


def _in_a_process(options: argparse.Namespace) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(_measured, options).result()


def _measured(options: argparse.Namespace) -> dict[str, float]:
    model = _model(options)
    ids_BL = torch.randint(5, VOCABULARY, (options.rows, options.prompt + options.tokens))
    ids_BL[:, : options.prompt] = ids_BL[0, : options.prompt].clone()
    if options.subject == "estimate":
        return _estimate(model, options)
    subjects = {"ours": _ours, "padded": _padded, "canary": _canary, "trl": _trl}
    subjects |= {"backbone": _backbone, "packed-backbone": _packed_backbone}
    return _peak_and_time(subjects[options.subject](model, ids_BL, options), options.device)


def _model(options: argparse.Namespace) -> Any:
    """The same weights for every subject."""
    name, changed = SHAPES[options.shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape_config(name), **changed})
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    if options.subject == "trl":
        return model
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if options.checkpointing == "on" and "backbone" in options.subject:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _ours(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    config = GRPOConfig(
        num_generations=options.rows,
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=1,
        max_completion_length=options.tokens,
        gradient_checkpointing=options.checkpointing == "on",
        vllm_importance_sampling_correction=False,  # nobody has sampled these completions
    )
    group = Group("", tuple(ids_BL[0, : options.prompt].tolist()), tuple(_completions(ids_BL, options)))
    batch = Batch.from_groups([group], torch.linspace(-1, 1, options.rows))
    policy = Policy(model, config)
    policy.logprobs(batch.select(torch.arange(2)))  # how a model is given its rows is found out once a run
    return lambda: policy.update(batch)


def _completions(ids_BL: Any, options: argparse.Namespace) -> list[Any]:
    rows = ids_BL[:, options.prompt :].tolist()
    return [Completion("", tuple(row), (-12.0,) * len(row), "length", 1) for row in rows]


def _padded(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    return patch("lora_grpo.grpo.packing.pays", lambda _: False)(_ours(model, ids_BL, options))


def _canary(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    _ours(model, ids_BL, options)  # after it the model is known to take packed rows, as in a run
    prompt = ids_BL[0, : options.prompt].tolist()
    pairs = [(prompt, made) for made in _completions(ids_BL, options)] * (CANARY_ROWS // options.rows)
    limits = {"batch_rows": options.rows, "known_noise": 99.0, "most_noise": 99.0}
    return lambda: take_canary(model, FakeEngine(lambda _: "").logprobs, pairs, nullcontext(), 1.0, **limits)


def _trl(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    import trl
    from datasets import Dataset

    args = trl.GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=options.rows,
        num_generations=options.rows,
        max_completion_length=options.tokens,
        gradient_checkpointing=options.checkpointing == "on",
        bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * options.rows}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if args.gradient_checkpointing:  # as its `train` does
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    prompt_BP, completion_BT = ids_BL.to(options.device).split([options.prompt, options.tokens], 1)
    inputs = {
        "prompt_ids": prompt_BP,
        "prompt_mask": torch.ones_like(prompt_BP),
        "completion_ids": completion_BT,
        "completion_mask": torch.ones_like(completion_BT),
        "advantages": torch.linspace(-1, 1, options.rows, device=options.device),
        "num_items_in_batch": torch.tensor(completion_BT.numel(), device=options.device),
    }

    def step() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()

    return step


def _backbone(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    return lambda: _to_the_last_hidden_state(model, input_ids=ids_BL.to(options.device))


def _packed_backbone(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    row = pack(ids_BL.tolist(), [options.prompt] * options.rows)
    ids_1N, positions_1N = torch.tensor([[row.ids], [row.positions]], device=options.device)
    inputs = {"input_ids": ids_1N, "attention_mask": torch.ones_like(ids_1N), "position_ids": positions_1N}
    return in_spans(model, row.spans)(lambda: _to_the_last_hidden_state(model, **inputs))


def _to_the_last_hidden_state(model: Any, **inputs: Any) -> None:
    model.get_base_model().model(**inputs, use_cache=False).last_hidden_state.float().mean().backward()


def _estimate(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """What the step's activations are said to take, and the time it takes to say so."""
    engine = EngineConfig(urls=("http://elsewhere",))
    batch = LargestBatch(options.rows, options.prompt, options.tokens, group=options.rows)
    started = time.process_time()
    needed = estimate(model, None, engine, batch, False, options.checkpointing == "on")
    return {"peak_mib": (needed.activations_bytes or 0) / 2**20, "cpu_s": time.process_time() - started}


def _peak_and_time(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Of one step: on a CPU the first; on a GPU the third, without what a first one compiles and keeps, or the first
    two of a policy look at besides."""
    on_cpu = device == "cpu"
    for _ in range(0 if on_cpu else 2):
        step()
    now = time.process_time if on_cpu else Clock(device).now
    forget_peaks(device)
    before, started = level(device), now()
    step()
    seconds = now() - started
    return {"peak_mib": (peak(device)[0] - before) / 2**20, "cpu_s" if on_cpu else "seconds": seconds}


if __name__ == "__main__":
    main()
