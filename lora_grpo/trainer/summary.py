"""What a run says of itself at its start and at its end."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from typing import Any

from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.metrics.packages import package_versions
from lora_grpo.trainer.run import Run
from lora_grpo.trainer.stepping import GAP


def run_info(run: Run) -> dict[str, Any]:
    """What it runs with."""
    probe, match = run.sync.probe, run.sync.base_match
    return {
        "model": getattr(peft_model_of(run.model).base_model.model.config, "_name_or_path", ""),
        "device": str(run.policy.device),
        "adapter_mib": round(run.sync.adapter_bytes / 2**20, 3),
        "store": str(run.store.root),
        "base_match": None if match is None else str(match),
        "probe": None if probe is None else asdict(probe),
        "packages": package_versions(),
        "config": run.config.model_dump(mode="json"),
    }


def summary(run: Run, seconds: float) -> dict[str, Any]:
    """What became of it, over the whole run but for `seconds` and the rollouts' counts, which are this process's.

    `reward_*` are the first and the last held-out reward.
    """
    evaluations, history = run.evaluations, run.history
    gaps = [metrics[GAP] for metrics in history if math.isfinite(metrics[GAP])]
    syncs = [sum(v for name, v in metrics.items() if name.startswith("sync/")) for metrics in history]
    return {
        "reward_before": evaluations[0].metrics["reward"] if evaluations else None,
        "reward_after": evaluations[-1].metrics["reward"] if evaluations else None,
        "steps": run.steps_done,
        "seconds": round(seconds, 2),
        "sync_median_s": round(statistics.median(syncs), 5) if syncs else None,
        "logprob_gap_mean": statistics.fmean(gaps) if gaps else None,
        "versions": len(run.store.list()),
        "rollbacks": run.rollbacks,
        **run.rollouts.counts(),
        "run": str(run.run_dir),
    }
