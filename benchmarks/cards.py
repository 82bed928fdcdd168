"""What fits which card, computed and not measured: `python benchmarks/cards.py > examples/docs/cards.md`.

The arithmetic is that of `lora-grpo check`: weights, adapter with optimizer, activations of one micro-batch, the engine
beside them with a KV cache for one batch of completions. No GPU takes part."""

from dataclasses import replace
from itertools import product

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.bench.shapes import SHAPES
from lora_grpo.config import EngineConfig
from lora_grpo.trainer.memory import LargestBatch, estimate_memory

MODELS = {
    "Qwen2.5 1.5B": SHAPES["qwen2.5-1.5b"],
    "Qwen2.5 3B": SHAPES["qwen2.5-1.5b"]
    | {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "Qwen2.5 7B": SHAPES["qwen2.5-7b"],
    "Llama 3.1 8B": SHAPES["llama-3.1-8b"],
}
CARDS_GB = (16, 24, 48, 80)
BATCH = LargestBatch(rows=8, prompt_tokens=512, completion_tokens=1024)
TRIES = ((BATCH, False), (BATCH, True), (replace(BATCH, rows=1), True))
COMPLETIONS = 64  # sampled at the same time
RESERVED_BYTES = 3 << 29  # for CUDA's own state and for what vLLM's kernels work in
WAYS = {"two copies": (False, None), "one copy, shared": (True, None), "two copies in nf4": (False, "nf4")}
"""Whether the base is shared, and how it is quantized."""


def main() -> None:
    print("# What fits which card\n\n<!-- Written by benchmarks/cards.py. -->\n")
    print(
        f"Computed, not measured. bf16, LoRA of rank 16 on all linear layers, micro-batches of "
        f"{BATCH.rows} rows of {BATCH.prompt_tokens} + {BATCH.completion_tokens} tokens, {COMPLETIONS} completions "
        f"of up to {BATCH.length:,} tokens sampled at the same time, two adapter slots, {RESERVED_BYTES / 2**30:g} GiB "
        "kept for CUDA. The parts are those of `lora-grpo check`. **yes**: as it is. **checkpointing**: with "
        "`gradient_checkpointing`, which is switched on where it is needed. **1 row**: that, and "
        "`per_device_train_batch_size=1` with eight times the `gradient_accumulation_steps`.\n"
    )
    print("| model | base | GiB | with checkpointing | 1 row at a time | ", end="")
    print(" | ".join(f"{gb} GB" for gb in CARDS_GB) + " |")
    print("|---|---|---:|---:|---:|" + "---|" * len(CARDS_GB))
    for name, way in product(MODELS, WAYS):
        needs = [_needed_bytes(name, way, *one) for one in TRIES]
        answers = list(zip(("yes", "checkpointing", "1 row"), needs, strict=True))
        fits = [next((answer for answer, need in answers if need <= gb * 1e9), "no") for gb in CARDS_GB]
        print(f"| {name} | {way} | " + " | ".join([*(f"{need / 2**30:.1f}" for need in needs), *fits]) + " |")


def _needed_bytes(name: str, way: str, batch: LargestBatch, checkpointing: bool) -> int:
    config = AutoConfig.for_model(**MODELS[name])
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    lora, engine = LoraConfig(r=16, target_modules="all-linear"), EngineConfig(max_loras=2, dtype="bfloat16")
    model = get_peft_model(base, lora, low_cpu_mem_usage=True).to(torch.bfloat16)
    estimate = estimate_memory(model, batch, engine, checkpointing, *WAYS[way])
    head_size = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 2
    return estimate.total_bytes + COMPLETIONS * BATCH.length * token_bytes + RESERVED_BYTES


if __name__ == "__main__":
    main()
