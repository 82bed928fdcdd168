"""A run as it stands between two steps: its parts, how far it is, and what was measured so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.data import PromptSampler
from lora_grpo.trainer.crew import Crew
from lora_grpo.trainer.evaluation import Evaluation
from lora_grpo.trainer.overlap import rollouts_of
from lora_grpo.trainer.parts import Parts
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
        self.source = Source(
            config,
            parts.rendering,
            data,
            PromptSampler(len(data), prompts, config.seed),
            self.rollback_log,
            made_of.reward_funcs,
            spec.rollout_func,
        )
        self.rollouts = rollouts_of(self.source, parts)
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
