"""What a run says of itself at its start and at its end."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.trainer.stepping import GAP

if TYPE_CHECKING:
    from lora_grpo.trainer.grpo_trainer import GRPOTrainer


def run_info(trainer: GRPOTrainer) -> dict[str, Any]:
    """What it runs with."""
    probe, match = trainer.sync.probe, trainer.sync.base_match
    return {
        "model": getattr(peft_model_of(trainer.model).base_model.model.config, "_name_or_path", ""),
        "device": str(trainer.policy.device),
        "adapter_mib": round(trainer.sync.adapter_bytes / 2**20, 3),
        "store": str(trainer.store.root),
        "base_match": None if match is None else str(match),
        "probe": None if probe is None else asdict(probe),
        "config": trainer.config.model_dump(mode="json"),
    }


def summary(trainer: GRPOTrainer, seconds: float) -> dict[str, Any]:
    """What became of it, over the whole run but for `seconds` and the rollouts' counts, which are this process's.

    `reward_*` are the first and the last held-out reward.
    """
    evaluations, history = trainer.evaluations, trainer.history
    gaps = [metrics[GAP] for metrics in history if math.isfinite(metrics[GAP])]
    syncs = [sum(v for name, v in metrics.items() if name.startswith("sync/")) for metrics in history]
    return {
        "reward_before": evaluations[0].metrics["reward"] if evaluations else None,
        "reward_after": evaluations[-1].metrics["reward"] if evaluations else None,
        "steps": trainer.steps_done,
        "seconds": round(seconds, 2),
        "sync_median_s": round(statistics.median(syncs), 5) if syncs else None,
        "logprob_gap_mean": statistics.fmean(gaps) if gaps else None,
        "versions": len(trainer.store.list()),
        "rollbacks": trainer.rollbacks,
        **trainer.rollouts.counts(),
        "run": str(trainer.run_dir),
    }
