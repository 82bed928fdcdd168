"""A run as it stands between two steps: its parts, how far it is, what was measured, and what it says of itself."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.data import PromptSampler
from lora_grpo.metrics.log import package_versions
from lora_grpo.metrics.render import GAP
from lora_grpo.trainer.crew import Crew, Parts
from lora_grpo.trainer.evaluation import Evaluation
from lora_grpo.trainer.overlap import Ahead
from lora_grpo.trainer.preflight import Preflight
from lora_grpo.trainer.rollouts import Source


class Run:
    """What the loop, a rollback and a resume move on; `GRPOTrainer` is one, with the verbs that its user calls."""

    def __init__(self, crew: Crew, parts: Parts, made_of: Preflight) -> None:
        config, spec = made_of.config, made_of.spec
        self.config, self.run_dir, self.guard = config, Path(spec.run_dir), spec.guard
        self.crew, self.parts = crew, parts
        self.engine, self.model, self.policy, self.sync = parts.engine, parts.model, parts.policy, parts.sync
        self.eval_data, self.rollback_log = made_of.held_out, RollbackLog(self.run_dir)
        data, prompts = made_of.train, config.rows_per_step(crew.processes.count) // config.num_generations
        self.source = (Ahead if config.max_staleness else Source)(
            config,
            parts,
            data,
            PromptSampler(len(data), prompts, config.seed),
            self.rollback_log,
            made_of.reward_funcs,
            spec.rollout_func,
        )
        self.steps_done, self.without_signal = 0, 0
        self.history: list[dict[str, Any]] = []
        self.owed: dict[str, Any] | None = None
        self.evaluations: list[Evaluation] = []

    @property
    def store(self) -> AdapterStore:
        """Raises `ConfigError` in a process other than the first."""
        return self.sync.store

    @property
    def version(self) -> AdapterVersion:
        """The version that the next step samples from."""
        return self.sync.head

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back; every sampling seed depends on it."""
        return len(self.rollback_log)

    def take_up(self, step: int, *, without_signal: int) -> None:
        """Count on from `step`; what came after it in the history did not happen."""
        self.steps_done, self.without_signal = step, without_signal
        self.history = [metrics for metrics in self.history if metrics["step"] <= step]


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
        **run.source.counts(),
        "run": str(run.run_dir),
    }
