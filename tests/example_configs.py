"""The configs in examples/models: what `lora-grpo init` proposes, with the memory computed from the model's shape.

`python -m tests.example_configs` writes them; it needs neither the models nor the data, so that lengths are limits
instead of what is in the data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lora_grpo.bench.shapes import SHAPES
from lora_grpo.config import EngineConfig, ModelConfig, RunConfig
from lora_grpo.trainer.build import lora_config
from lora_grpo.trainer.memory import LargestBatch, MemoryEstimate, estimate_memory, mib
from lora_grpo.trainer.models import without_memory
from lora_grpo.trainer.proposing import MARKED, as_toml

FOLDER = Path(__file__).parents[1] / "examples" / "models"
MODELS = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}


def settings(shape: str) -> dict[str, Any]:
    large = SHAPES[shape]["hidden_size"] > 2048
    return {
        "output_dir": f"runs/{shape}",
        "model": {"name": MODELS[shape]},
        "lora": {"r": 16, "lora_alpha": 32},
        "data": {"train": "openai/gsm8k", "name": "main", "prompt_column": "question", "system_prompt": MARKED},
        "rewards": [{"name": "numeric"}],
        "engine": {"max_model_len": 1024},
        "grpo": {
            "total_steps": 200,
            "num_generations": 8,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 8,
            "max_prompt_length": 512,
            "overlong_prompts": "drop",
            "max_completion_length": 512,
            "learning_rate": 2e-5,
            **({"gradient_checkpointing": True} if large else {}),
        },
    }


def estimate(shape: str) -> MemoryEstimate:
    """On a GPU: bf16, and trainer and engine share the base."""
    config = RunConfig(**settings(shape))
    grpo = config.grpo
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**SHAPES[shape], dtype="bfloat16").save_pretrained(folder)
        empty = without_memory(ModelConfig(name=folder), lora_config(config.lora)).to(torch.bfloat16)
    batch = LargestBatch(grpo.per_device_train_batch_size, grpo.max_prompt_length or 0, grpo.max_completion_length)
    return estimate_memory(empty, batch, EngineConfig(dtype="bfloat16"), bool(grpo.gradient_checkpointing), True, None)


def text(shape: str) -> str:
    needed = estimate(shape)
    parts = ", ".join(f"{name} {mib(size)}" for name, size in needed.parts().items() if size)
    head = (
        "# Computed from the model's shape as `lora-grpo check` does, not measured: GPU, bf16, one copy of the base.\n"
        f"# {mib(needed.total_bytes)} and the KV cache: {parts}.\n"
        "# vLLM takes gpu_memory_utilization of the card for base, slots and KV cache; the rest is beside it.\n\n"
    )
    notes = {"engine.max_model_len": "max_prompt_length + max_completion_length", "lora.r": "rank"}
    return head + as_toml(settings(shape), notes)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        (FOLDER / f"{name}.toml").write_text(text(name), encoding="utf-8")
