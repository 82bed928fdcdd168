"""Your own rewards in `GRPOTrainer`: a script, divided into cells (# %%) for an editor or a notebook.

There are two rewards: one for the right answer, and a partial one for each right digit. You can use any function
`f(prompts, completions, **columns) -> list[float]`, also an async one; None leaves a row out.
"""

# %% Rewards in TRL's signature: `answer` is a column of the data
from peft import LoraConfig

from lora_grpo import EngineConfig, GRPOConfig, GRPOTrainer, ModelConfig
from lora_grpo.demo import MAX_TOKENS, ensure_base, held_out_rows, training_rows

# ("wandb",) logs to Weights & Biases (pip install wandb; WANDB_MODE=offline keeps it on disk); "tensorboard" works too
TRACKERS = ()


def right_answer(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def right_digits(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Share of right digits: it also rewards answers that are nearly right."""
    return [
        sum(a == b for a, b in zip(text, right, strict=False)) / len(right)
        for text, right in zip(completions, answer, strict=True)
    ]


# %% Try them before anything trains
print(right_answer(["42", "24"], ["42", "25"]), right_digits(["42", "24"], ["42", "25"]))

# %% Train on sums of two digits
with GRPOTrainer(
    ModelConfig(name=str(ensure_base()), dtype="float32"),
    [right_answer, right_digits],
    GRPOConfig(
        total_steps=15,
        num_generations=8,
        generation_batch_size=512,
        per_device_train_batch_size=256,
        gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        learning_rate=4e-3,
        reward_weights=(1.0, 0.3),
        report_to=TRACKERS,
    ),
    training_rows(),
    eval_dataset=held_out_rows(256),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    engine_config=EngineConfig(max_model_len=64, enforce_eager=True),
    run_dir="runs/custom-reward",
) as trainer:
    trainer.train()
    for evaluation in trainer.evaluations:
        print(f"v{evaluation.version}: held-out right answers {evaluation.metrics['rewards/right_answer']:.3f}")
    print(trainer.save_model("my-adapter", which="best"), "is in my-adapter")
