"""What selection saves and rescues: a grid of 16 learning rates against halving, and members with a planted collapse
with and without population-based training. Real training of a tiny Llama through vLLM.

    python -m benchmarks.selection [--steps 24] [--out FILE]

The grid's reward is the share of ASCII characters, the planted members' that of ASCII letters. The collapse is a weight
decay that takes the adapter away as fast as it is learned. Scores are held-out rewards (greedy) of the last version.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_grpo.bench.provenance import asked, provenance, write_result
from lora_grpo.config import DataConfig, EngineConfig, GRPOConfig, LoraSettings, ModelConfig, RewardConfig, RunConfig
from lora_grpo.trainer.sweeping.plan import SweepPlan, trials_of
from lora_grpo.trainer.sweeping.sweep import Sweep
from tests.tiny_models import tiny_model

RATES = [f"{10 ** (-5.9 + number * 0.2):.2g}" for number in range(16)]
PAIRS = [(first, second) for first in range(8) for second in range(8)]
PROMPTS = [f"{chr(97 + first)}{chr(97 + second)} is pair {first * 26 + second}: " for first, second in PAIRS]


def main() -> None:
    options = asked(__doc__, steps=24, out=None)
    about = provenance("-m", "benchmarks.selection")
    with tempfile.TemporaryDirectory(prefix="lora-grpo-selection-") as name:
        folder = Path(name)
        base = tiny_model("llama", folder / "base")
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        rates = trials_of([f"grpo.learning_rate={','.join(RATES)}"])
        planted = trials_of(["grpo.weight_decay=0,300", "grpo.seed=1,2"])
        third = options.steps // 8
        evolving = {"evolve_every": third, "perturb": ("grpo.weight_decay",), "share": 0.5}
        plans: dict[str, dict[str, Any]] = {
            "planted collapse": {"trials": planted},
            "planted collapse, taken over": {"trials": planted, **evolving},
            "halving": {"trials": rates, "rungs": (third, 2 * third, 4 * third)},
            "grid": {"trials": rates},
        }
        found = {}
        for what, plan in plans.items():
            kind = "letters" if "planted" in what else "ascii"
            settings = settings_of(base, rows, folder / what.replace(" ", "-"), options.steps, f"share_of_{kind}")
            found[what] = told(Sweep(SweepPlan(settings=settings, **plan)).run())
            print(what, json.dumps(found[what]), flush=True)
    write_result(options.out, {**about, "steps": options.steps, "found": found})


def share_of_ascii(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(letter.isascii() for letter in text) / max(1, len(text)) for text in completions]


def share_of_letters(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(letter.isascii() and letter.isalpha() for letter in text) / max(1, len(text)) for text in completions]


def settings_of(base: Path, rows: Path, directory: Path, steps: int, reward: str) -> RunConfig:
    return RunConfig(
        output_dir=str(directory),
        model=ModelConfig(name=str(base), dtype="float32"),
        lora=LoraSettings(r=8, lora_alpha=16),
        data=DataConfig(train=str(rows), eval=str(rows)),
        rewards=(RewardConfig(name=f"benchmarks.selection:{reward}"),),
        engine=EngineConfig(max_model_len=64, max_num_seqs=256, enforce_eager=True, dtype="float32"),
        grpo=GRPOConfig(
            total_steps=steps,
            learning_rate=3e-3,
            num_generations=4,
            generation_batch_size=64,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=1,
            max_completion_length=6,
            lr_scheduler_type="constant",
            canary_every=1000,
        ),
    )


def told(summary: dict[str, Any]) -> dict[str, Any]:
    """Steps of all members, the pick, and every member's held-out reward."""
    members = {row["member"]: row["held_out"] for row in summary["members"]}
    return {"steps": summary["steps"], "best": summary["best"], "held_out": summary["held_out"], "members": members}


if __name__ == "__main__":
    main()
