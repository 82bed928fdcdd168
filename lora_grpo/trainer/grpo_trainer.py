"""`GRPOTrainer`: prompts, rewards and a LoRA model in, better versions out; every rollout from a proven version."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn

from lora_grpo.adapters.peft_format import peft_model_of
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import EngineConfig, GRPOConfig, KeepConfig, ModelConfig
from lora_grpo.data import PromptDataset, PromptSampler, Rows, load_prompts
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.metrics import Reporter, plot_run
from lora_grpo.rewards import RewardFunction, check_columns
from lora_grpo.rollback import RollbackReport, Target, resolve
from lora_grpo.trainer.assembly import assemble
from lora_grpo.trainer.evaluation import Evaluation, evaluate, save_evaluation
from lora_grpo.trainer.rollouts import RolloutFunc
from lora_grpo.trainer.stepping import GAP, Clock, learn, reward, roll_out, sample_rows, step_metrics

PATIENCE_STEPS = 10
"""Steps in a row without any signal (every group's rewards equal) after which a run ends."""


class GRPOTrainer:
    """GRPO on a LoRA adapter: each step samples from the version that the step before published and proved."""

    def __init__(
        self,
        model: str | Path | ModelConfig | nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        config: GRPOConfig | None = None,
        train_dataset: Rows | PromptDataset | str | Path | None = None,
        *,
        eval_dataset: Rows | PromptDataset | str | Path | None = None,
        peft_config: Any = None,
        processing_class: Any = None,
        engine: Engine | None = None,
        engine_config: EngineConfig | None = None,
        keep: KeepConfig | None = None,
        run_dir: str | Path = "runs/grpo",
        store_root: str | Path | None = None,
        rollout_func: RolloutFunc | None = None,
        view: bool = True,
    ) -> None:
        """Build everything that is not given: the engine on `model`, the PEFT model, the store.

        `model` is a hub name, a directory or a `ModelConfig` (with `peft_config`), or a PeftModel on one of them. An
        `engine` that is given stays open when the trainer closes. Raises `ConfigError`, `UnsupportedAdapter` or
        `DeliveryError` before anything is trained.
        """
        self.config = config or GRPOConfig()
        self.run_dir = Path(run_dir)
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.train_data = _prompts(train_dataset, "train_dataset")
        self.eval_data = None if eval_dataset is None else _prompts(eval_dataset, "eval_dataset")
        check_columns(self.reward_funcs, self.train_data.column_names)
        self.rollout_func = rollout_func
        self._view = view
        self._closing = ExitStack()
        with self._reporting() as reporter, ExitStack() as on_failure:
            on_failure.callback(self._closing.close)
            self.parts = assemble(
                self._closing,
                reporter,
                self.config,
                model=ModelConfig(name=str(model)) if isinstance(model, str | Path) else model,
                peft_config=peft_config,
                processing_class=processing_class,
                engine=engine,
                engine_config=engine_config or EngineConfig(),
                keep=keep or KeepConfig(),
                run_dir=self.run_dir,
                store_root=store_root,
            )
            on_failure.pop_all()
        self.engine, self.model, self.store = self.parts.engine, self.parts.model, self.parts.store
        self.policy, self.sync = self.parts.policy, self.parts.sync
        prompts_per_step = self.config.rows_per_step(1) // self.config.num_generations
        self.sampler = PromptSampler(len(self.train_data), prompts_per_step, self.config.seed)
        self.steps_done, self.rollbacks, self._without_signal = 0, 0, 0
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[Evaluation] = []

    def train(self) -> dict[str, Any]:
        """Run to `config.total_steps`; returns a summary. Ctrl-C and errors leave the last version intact.

        Raises `ConfigError` when the run directory holds a run that was not resumed.
        """
        started = time.perf_counter()
        with self._reporting() as reporter:
            reporter.start(self._info(), step=self.steps_done)
            try:
                self._begin(reporter)
                while self.steps_done < self.config.total_steps and self._without_signal < PATIENCE_STEPS:
                    self._step(reporter)
                    self._evaluate_when_due(reporter)
            finally:
                self.store.flush()
            result = self._summary(time.perf_counter() - started)
            reporter.end(result)
        plot_run(self.run_dir)
        return result

    @property
    def version(self) -> AdapterVersion:
        """The version that the next step samples from."""
        return self.sync.head

    def rollback(self, to: Target) -> RollbackReport:
        """Engine and trainer go on from an earlier version: a number, "parent" or "best:METRIC".

        Weights, optimizer, schedule, random state and step are those of that version. The prompts go on where they
        are and every sampling seed changes, so that the next batches are not the ones that led astray.
        """
        report = self.sync.rollback(to)
        self.rollbacks += 1
        self.steps_done, self._without_signal = report.version.step, 0
        self.store.record(report.version, rollbacks=self.rollbacks)
        return report

    def resume(self) -> RollbackReport | None:
        """Go on with the run in `run_dir`: weights, optimizer, schedule, random state, step, prompts and `HEAD`.

        Starts from the last promoted version whose trainer state reached the archive; None when nothing was published.
        Raises `ConfigError` when no state was kept.
        """
        head = self.store.head
        while head is not None and "state" not in self.store.where(head.number):
            if head.parent is None:
                raise ConfigError(f"{self.run_dir} kept no trainer state of {self.store.head} or its ancestors")
            head = self.store.get(head.parent)
        if head is None:
            return None
        report = self.sync.rollback(head.number)
        recorded = [self.store.metrics(version.number).get("rollbacks", 0) for version in self.store.list()]
        self.rollbacks = max([int(report.extra["rollbacks"]), *map(int, recorded)])
        self.steps_done, self._without_signal = int(report.extra["steps_done"]), int(report.extra["without_signal"])
        self.sampler.load_state_dict(report.extra["sampler"])
        return report

    def evaluate(self) -> Evaluation:
        """Answer the held-out prompts greedily with the current version; recorded with it and in the run directory.

        Raises `ConfigError` when there are none.
        """
        if self.eval_data is None:
            raise ConfigError("there are no held-out prompts; pass eval_dataset")
        result = evaluate(self.engine, self.version, self.eval_data, self.reward_funcs, self.config)
        save_evaluation(self.run_dir, result)
        self.store.record(self.version, **{f"eval/{name}": value for name, value in result.metrics.items()})
        self.evaluations.append(result)
        return result

    def save_model(self, directory: str | Path, which: Literal["last", "best"] = "last") -> AdapterVersion:
        """Write a version as a plain PEFT folder that `PeftModel.from_pretrained` and vLLM load.

        "best" is the version with the highest held-out reward (training reward without held-out prompts).
        """
        metric = "reward" if self.eval_data is None else "eval/reward"
        version = self.version if which == "last" else resolve(self.store, f"best:{metric}")
        self.sync.export(version, Path(directory))
        return version

    def close(self) -> None:
        """Close the store, and the engine if this trainer started it. A second call does nothing."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, reporter: Reporter) -> None:
        if self.store.head is None:
            self._publish(0)
            self._evaluate(reporter)
        elif self.steps_done == 0 and not self.rollbacks:
            raise ConfigError(f"{self.run_dir} holds a run at {self.version}; resume it, or choose another run_dir")

    def _step(self, reporter: Reporter) -> None:
        clock, version, step = Clock(reporter), self.version, self.steps_done + 1
        with clock("generate"):
            prompts, columns = self.train_data.select(next(self.sampler))
            groups = roll_out(
                self.parts, self.config, self.rollout_func, prompts, version, step=step, rollbacks=self.rollbacks
            )
        with clock("reward"):
            rewarded = reward(self.reward_funcs, groups, columns, self.config, step)
        with clock("train"):
            learned = learn(self.parts, self.config, rewarded, step)
        self.steps_done = step
        self._without_signal = 0 if rewarded.used_groups(self.config.num_generations) else self._without_signal + 1
        with clock("publish"):
            self._publish(step)
        metrics = {
            **step_metrics(rewarded, self.reward_funcs, self.config, self.sync.last_receipt),
            **learned,
            "version": version.number,
            **clock.seconds,
            "step_time": sum(clock.seconds.values()),
        }
        self.store.record(version, **{name: value for name, value in metrics.items() if name.startswith("reward")})
        self.history.append(metrics)
        reporter.step(step, metrics)
        if self.config.log_completions_every and step % self.config.log_completions_every == 0:
            reporter.samples(step, sample_rows(rewarded))

    def _publish(self, step: int) -> None:
        extra = {
            "steps_done": step,
            "rollbacks": self.rollbacks,
            "without_signal": self._without_signal,
            "sampler": self.sampler.state_dict(),
        }
        self.sync.push(step, extra=extra)

    def _evaluate_when_due(self, reporter: Reporter) -> None:
        every, last = self.config.eval_every, self.steps_done == self.config.total_steps
        stopped = self._without_signal >= PATIENCE_STEPS
        if stopped:
            reporter.message(f"{PATIENCE_STEPS} steps without a group of unequal rewards: nothing left to learn")
        if last or stopped or (every and self.steps_done % every == 0):
            self._evaluate(reporter)

    def _evaluate(self, reporter: Reporter) -> None:
        if self.eval_data is not None:
            result = self.evaluate()
            reporter.evaluation(self.steps_done, result.version, result.metrics)

    def _reporting(self) -> Reporter:
        return Reporter(self.run_dir, self.config.total_steps, view=self._view, trackers=self.config.report_to)

    def _info(self) -> dict[str, Any]:
        probe = self.sync.probe
        return {
            "model": getattr(peft_model_of(self.model).base_model.model.config, "_name_or_path", ""),
            "device": str(self.policy.device),
            "adapter_mib": round(self.sync.adapter_bytes / 2**20, 3),
            "store": str(self.store.root),
            "probe": None if probe is None else asdict(probe),
            "config": self.config.model_dump(mode="json"),
        }

    def _summary(self, seconds: float) -> dict[str, Any]:
        first, last = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else (None, None)
        syncs = [sum(v for name, v in metrics.items() if name.startswith("sync/")) for metrics in self.history]
        return {
            "accuracy_before": first.metrics["reward"] if first else None,
            "accuracy_after": last.metrics["reward"] if last else None,
            "steps": self.steps_done,
            "seconds": round(seconds, 2),
            "sync_median_s": round(statistics.median(syncs), 5) if syncs else None,
            "logprob_gap_mean": statistics.fmean(m[GAP] for m in self.history) if self.history else None,
            "versions": len(self.store.list()),
            "run": str(self.run_dir),
        }


def _prompts(data: Any, name: str) -> PromptDataset:
    if data is None:
        raise ConfigError(f"{name} is missing: pass a datasets.Dataset, a list of dicts with 'prompt', or a file")
    return data if isinstance(data, PromptDataset) else load_prompts(data)
