"""The demo from end to end: make the base, train through vLLM, show what it gained and what that cost."""

import json
import statistics
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lora_grpo.config import DataConfig, EngineConfig, LoraSettings, ModelConfig, RewardConfig, RunConfig
from lora_grpo.demo import MAX_TOKENS, BaseRecipe, base_path, ensure_base, held_out_rows, training_rows
from lora_grpo.grpo_config import GRPOConfig

STEPS = 30
PROMPTS_PER_STEP, GROUP = 64, 8


def run_demo(output_dir: Path = Path("runs/demo"), steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Run the demo in `output_dir` (or the first free `output_dir-2`, ...), shown on stderr; returns the summary."""
    console = Console(stderr=True)
    base = _base(console)
    config = demo_config(base, _free(output_dir), steps=steps or STEPS, seed=seed)
    from lora_grpo.trainer import build_trainer

    with build_trainer(config) as trainer:
        result = trainer.train()
    before, after = trainer.evaluations[0].metrics, trainer.evaluations[-1].metrics
    signal = statistics.fmean(metrics["frac_groups_used"] for metrics in trainer.history)
    summary = {
        "accuracy_before": result.pop("reward_before"),
        "accuracy_after": result.pop("reward_after"),
        "accuracy_easy_before": before["reward/carry=false"],
        "accuracy_easy_after": after["reward/carry=false"],
        "accuracy_hard_before": before["reward/carry=true"],
        "accuracy_hard_after": after["reward/carry=true"],
        "groups_with_signal_mean": round(signal, 4),
        **result,
    }
    _tell(console, summary, config.output_dir)
    return summary


def demo_config(base: Path, run_dir: Path, *, steps: int, seed: int) -> RunConfig:
    """The demo's settings, with its prompts written into the run directory."""
    data = run_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    return RunConfig(
        output_dir=str(run_dir),
        model=ModelConfig(name=str(base), dtype="float32"),
        lora=LoraSettings(r=16, lora_alpha=32),
        data=DataConfig(
            train=_write(data / "train.jsonl", training_rows()),
            eval=_write(data / "held_out.jsonl", held_out_rows()),
        ),
        rewards=(RewardConfig(name="exact"),),
        engine=EngineConfig(
            max_model_len=64,
            max_num_seqs=512,
            max_num_batched_tokens=8192,
            enforce_eager=True,
            gpu_memory_utilization=0.1,
        ),
        grpo=GRPOConfig(
            seed=seed,
            total_steps=steps,
            num_generations=GROUP,
            generation_batch_size=PROMPTS_PER_STEP * GROUP,
            per_device_train_batch_size=PROMPTS_PER_STEP * GROUP // 2,
            gradient_accumulation_steps=1,
            max_completion_length=MAX_TOKENS,
            epsilon_high=0.28,
            learning_rate=4e-3,
            adam_beta2=0.99,
            eval_every=10,
            log_completions_every=20,
        ),
    )


def _base(console: Console) -> Path:
    recipe = BaseRecipe()
    if base_path(recipe).is_dir():
        return ensure_base(recipe)
    console.print(f"making the base model (once), in {base_path(recipe)}", soft_wrap=True)
    with Progress(console=console, transient=True) as bar:
        shown = bar.add_task("training it", total=recipe.steps)
        return ensure_base(recipe, progress=lambda done, total, loss: bar.update(shown, completed=done))


def _free(directory: Path) -> Path:
    """`directory`, or the first of `directory-2`, `directory-3`, ... that is not there."""
    others = (directory.with_name(f"{directory.name}-{number}") for number in count(2))
    return next(path for path in chain([directory], others) if not path.exists())


def _write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _tell(console: Console, result: dict[str, Any], run_dir: str) -> None:
    console.print(
        f"held-out accuracy, greedy, through vLLM: {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f}\n"
        f"  problems with a carry:    {result['accuracy_hard_before']:.3f} -> {result['accuracy_hard_after']:.3f}\n"
        f"  problems without a carry: {result['accuracy_easy_before']:.3f} -> {result['accuracy_easy_after']:.3f}\n"
        f"  groups that carried signal: {result['groups_with_signal_mean']:.0%}; trainer/sampler log-prob gap "
        f"{result['logprob_gap_mean']:.4f} nats per token; sync {1000 * result['sync_median_s']:.1f} ms (median)\n"
        f"every answer, version and reward: {run_dir}; recompute with: lora-grpo eval {run_dir}",
        soft_wrap=True,  # a command is copied as one line
    )
