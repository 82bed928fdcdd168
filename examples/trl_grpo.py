"""TRL's GRPOTrainer with one line changed: vLLM gets the adapter alone, and nothing is merged.

It trains the demo task (two-digit sums, for a model that forgets the carry) on a CPU or a GPU:

    python examples/trl_grpo.py                    # TRL's trainer with our way to vLLM
    python examples/trl_grpo.py --trainer ours     # the same work on lora_grpo.GRPOTrainer
    python examples/trl_grpo.py --trainer stock    # TRL unchanged (needs a GPU: its weight push fails on the CPU)

The last line on stdout is one JSON object with the results.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

import lora_grpo
from lora_grpo.demo import MAX_TOKENS, ensure_base, held_out_rows, training_rows

# This is the changed line. Everything else in `with_trl` is as in a script for stock TRL.
from lora_grpo.integrations.trl import NativeGRPOTrainer as GRPOTrainer
from lora_grpo.rewards import exact

ROWS_A_STEP, GROUP, UPDATES_A_STEP = 512, 8, 2
# Settings that have the same name in both trainers.
COMMON: dict[str, Any] = {
    "num_generations": GROUP,
    "generation_batch_size": ROWS_A_STEP,
    "per_device_train_batch_size": ROWS_A_STEP // UPDATES_A_STEP,
    "gradient_accumulation_steps": 1,
    "max_completion_length": MAX_TOKENS,
    "learning_rate": 4e-3,
    "adam_beta2": 0.99,
    "epsilon_high": 0.28,
    "seed": 0,
}
right = exact("answer")  # 1 if the completion is the row's answer, else 0
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def with_trl(trainer_class: Any, base: Path, steps: int, output_dir: Path) -> dict[str, Any]:
    """Train with TRL: with its own GRPOTrainer, or with the one that replaces it."""
    trainer = trainer_class(
        model=str(base),
        reward_funcs=right,
        args=trl.GRPOConfig(
            output_dir=str(output_dir),
            max_steps=UPDATES_A_STEP * steps,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            vllm_gpu_memory_utilization=0.1,
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=UPDATES_A_STEP,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **COMMON,
        ),
        train_dataset=Dataset.from_list([dict(row) for row in training_rows()]),
        peft_config=LORA,
    )
    native = getattr(trainer, "native", None)  # stock TRL cannot answer held-out prompts
    before = native and accuracy(native.engine, None)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return {
        "accuracy_before": before,
        "accuracy_after": native and accuracy(native.engine, trainer.publish()),
        "step_s": seconds / steps,
        "sync_s": sync_s([entry for entry in trainer.state.log_history if "sync/load_s" in entry]),
    }


def with_ours(base: Path, steps: int, output_dir: Path) -> dict[str, Any]:
    """The same work on our trainer; one step is one generation, with as many updates as fit its rows."""
    trainer = lora_grpo.GRPOTrainer(
        lora_grpo.ModelConfig(name=str(base), dtype="float32"),
        right,
        lora_grpo.GRPOConfig(total_steps=steps, **COMMON),
        training_rows(),
        eval_dataset=held_out_rows(),
        peft_config=LORA,
        engine_config=lora_grpo.EngineConfig(
            max_model_len=64, gpu_memory_utilization=0.1, max_num_seqs=ROWS_A_STEP, enforce_eager=True
        ),
        run_dir=output_dir,
        view=False,
    )
    with trainer:
        trained = trainer.train()
    return {
        "accuracy_before": trained["reward_before"],
        "accuracy_after": trained["reward_after"],
        "step_s": statistics.fmean(metrics["step_time"] for metrics in trainer.history),
        "sync_s": sync_s(trainer.history),
    }


def accuracy(engine: Any, version: Any) -> float:
    """Share of 512 held-out sums that an adapter version answers right, greedily; None is the base."""
    rows = held_out_rows()
    greedy = lora_grpo.Sampling(max_tokens=MAX_TOKENS, temperature=0.0)
    groups = engine.generate([row["prompt"] for row in rows], greedy, adapter=version)
    answers = [group.completions[0].text for group in groups]
    return statistics.fmean(right(answers, answer=[row["answer"] for row in rows]))


def sync_s(steps: list[dict[str, Any]]) -> float | None:
    """Seconds that a sync takes (median); None for stock TRL, which does not say."""
    sums = [sum(value for name, value in step.items() if name.startswith("sync/")) for step in steps]
    return statistics.median(sums) if sums else None


def peak_memory_mib() -> float:
    """Peak memory of this process: on the GPU (torch's allocator) if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["native", "ours", "stock"], default="native")
    parser.add_argument("--steps", type=int, default=30, help="generations, each with two optimizer updates")
    parser.add_argument("--output-dir", type=Path, help="default: a new one under runs/")
    chosen = parser.parse_args()
    base = ensure_base()
    folder = chosen.output_dir or Path("runs") / f"trl-{chosen.trainer}-{time.strftime('%Y%m%d-%H%M%S')}"
    if chosen.trainer == "ours":
        measured = with_ours(base, chosen.steps, folder)
    else:
        measured = with_trl(GRPOTrainer if chosen.trainer == "native" else trl.GRPOTrainer, base, chosen.steps, folder)
    print(json.dumps({"trainer": chosen.trainer, "steps": chosen.steps, **measured, "memory_mib": peak_memory_mib()}))


if __name__ == "__main__":
    main()
