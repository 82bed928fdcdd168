"""GSM8K on one GPU; gsm8k.toml is the same run."""

import re

from datasets import load_dataset
from peft import LoraConfig

from lora_grpo import EngineConfig, GRPOConfig, GRPOTrainer

SYSTEM = "Think step by step. End with #### and the number."


def as_chat(row):
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]}


def right_number(completions, answer, **columns):  # TRL's signature; `answer` is a column of the data
    said = [re.findall(r"-?\d+", chat[-1]["content"].replace(",", "")) for chat in completions]
    right = [text.split("####")[1].strip().replace(",", "") for text in answer]
    return [float(numbers[-1:] == [number]) for numbers, number in zip(said, right, strict=True)]


with GRPOTrainer(
    "Qwen/Qwen2.5-0.5B-Instruct",
    right_number,
    GRPOConfig(
        total_steps=200,
        num_generations=8,  # completions for each prompt
        per_device_train_batch_size=16,  # 8 batches (gradient_accumulation_steps) make a step
        max_completion_length=512,  # tokens
        learning_rate=2e-5,
    ),
    load_dataset("openai/gsm8k", "main", split="train").map(as_chat),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    engine_config=EngineConfig(max_model_len=1024),
    run_dir="runs/gsm8k",
) as trainer:
    trainer.train()
    trainer.save_model("my-adapter", which="best")
