"""A custom reward in `GRPOTrainer`: TRL's signature, extra columns of your data passed through.

    python examples/custom_reward.py

Two rewards share the work: the answer must be right, and a partial one pays for each right digit. Any function
`f(prompts, completions, **columns) -> list[float]` will do, async ones too; None leaves a row out.
"""

import argparse

from peft import LoraConfig

from lora_grpo import EngineConfig, GRPOConfig, GRPOTrainer, ModelConfig
from lora_grpo.demo import task
from lora_grpo.demo.base import ensure_base


def right_answer(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def right_digits(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Share of digits in place: a slope where the exact answer is a cliff."""
    return [
        sum(a == b for a, b in zip(text, right, strict=False)) / len(right)
        for text, right in zip(completions, answer, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--run-dir", default="runs/custom-reward")
    parser.add_argument("--save", default=None, help="write the best version there as a plain PEFT folder")
    arguments = parser.parse_args()

    with GRPOTrainer(
        ModelConfig(name=str(ensure_base()), dtype="float32"),
        [right_answer, right_digits],
        GRPOConfig(
            total_steps=arguments.steps,
            num_generations=8,
            generation_batch_size=512,
            per_device_train_batch_size=256,
            gradient_accumulation_steps=1,
            max_completion_length=task.MAX_TOKENS,
            learning_rate=4e-3,
            reward_weights=(1.0, 0.3),
        ),
        task.training_rows(),
        eval_dataset=task.held_out_rows(256),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        engine_config=EngineConfig(max_model_len=64, enforce_eager=True),
        run_dir=arguments.run_dir,
    ) as trainer:
        trainer.train()
        for evaluation in trainer.evaluations:
            print(f"v{evaluation.version}: held-out right answers {evaluation.metrics['rewards/right_answer']:.3f}")
        if arguments.save:
            print(f"{trainer.save_model(arguments.save, which='best')} saved to {arguments.save}")


if __name__ == "__main__":
    main()
