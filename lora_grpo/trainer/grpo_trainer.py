"""`GRPOTrainer`: prompts, rewards and a LoRA model in, better versions out; every rollout from a proven version."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_grpo.adapters.peft_format import peft_model_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import EngineConfig, GRPOConfig, ModelConfig
from lora_grpo.data import PromptDataset, PromptSampler, Rows, load_prompts
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.canary import RESOLUTION, CanaryReport
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.advantages import group_advantages, reward_metrics, weighted_rewards
from lora_grpo.grpo.batch import Batch
from lora_grpo.metrics import Reporter, plot_run
from lora_grpo.policy import Policy
from lora_grpo.rewards import RewardContext, RewardFunction, check_columns, reward_names, score
from lora_grpo.rewards.scoring import TrainerState
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.evaluation import Evaluation, evaluate, save_evaluation
from lora_grpo.trainer.models import (
    build_engine,
    build_policy_model,
    check_same_device,
    lora_rank,
    pad_token_id,
    planned_memory,
)
from lora_grpo.trainer.rollouts import RolloutFunc, check_groups, training_sampling
from lora_grpo.types import Group

CANARY_ROWS = 16
GAP = "sampling/sampling_logp_difference/mean"
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
        run_dir: str | Path = "runs/grpo",
        store_root: str | Path | None = None,
        rollout_func: RolloutFunc | None = None,
        view: bool = True,
    ) -> None:
        """Build everything that is not given: the engine on `model`, the PEFT model, the store.

        `model` is a hub name, a directory or a `ModelConfig` (with `peft_config`), or a PeftModel on one of them. An `engine`
        that is given stays open when the run ends. Raises `ConfigError`, `UnsupportedAdapter` or `DeliveryError`
        before anything is trained.
        """
        self.config = config or GRPOConfig()
        self.run_dir = Path(run_dir)
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.train_data = _prompts(train_dataset, "train_dataset")
        self.eval_data = None if eval_dataset is None else _prompts(eval_dataset, "eval_dataset")
        check_columns(self.reward_funcs, self.train_data.column_names)
        self.rollout_func = rollout_func
        self.reporter = Reporter(self.run_dir, self.config.total_steps, view=view, trackers=self.config.report_to)
        self._open = ExitStack()
        self._open.callback(self.reporter.close)
        try:
            self._build(_named(model), peft_config, processing_class, engine, engine_config, store_root)
        except BaseException:
            self._open.close()
            raise

    def _build(
        self,
        model: ModelConfig | nn.Module,
        peft_config: Any,
        processing_class: Any,
        engine: Engine | None,
        engine_config: EngineConfig | None,
        store_root: str | Path | None,
    ) -> None:
        if engine is None:
            settings = engine_config or EngineConfig()
            estimate = planned_memory(model, peft_config, settings)
            self.reporter.message(f"memory: {estimate}")
            self.reporter.message("starting the engine")
            with self.reporter.capture():
                engine = build_engine(model, settings, lora_rank(model, peft_config))
            self._open.callback(engine.close)
        self.engine = engine
        self.model = build_policy_model(model, peft_config, self.config.seed)
        check_same_device(self.model, engine)
        self.pad_token_id = pad_token_id(processing_class or getattr(engine, "tokenizer", None))
        self.store = AdapterStore(store_root, archive=self.run_dir)
        self._open.callback(self.store.close)
        self.policy = Policy(self.model, self.config)
        self.sync = NativeSync(
            self.model, engine, self.store, optimizer=self.policy.optimizer, scheduler=self.policy.scheduler
        )
        prompts_per_step = self.config.rows_per_step(1) // self.config.num_generations
        self.sampler = PromptSampler(len(self.train_data), prompts_per_step, self.config.seed)
        self.steps_done, self.rollbacks, self._without_signal = 0, 0, 0
        self._sync_s: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[Evaluation] = []

    def train(self) -> dict[str, Any]:
        """Run to `config.total_steps`; returns a summary. Ctrl-C and errors leave the last version intact."""
        started = time.perf_counter()
        try:
            self.reporter.start(self._info(), step=self.steps_done)
            if self.steps_done == 0:
                self.sync.push(step=0)
                self.evaluate()
            while self.steps_done < self.config.total_steps and self._without_signal < PATIENCE_STEPS:
                self._step()
                self._evaluate_when_due()
            result = self._summary(time.perf_counter() - started)
            self.reporter.end(result)
            self.store.flush()
        finally:
            self.close()
        plot_run(self.run_dir)
        return result

    @property
    def version(self) -> AdapterVersion:
        """The version that the next step samples from."""
        return self.sync.head

    def evaluate(self) -> Evaluation | None:
        """Answer the held-out prompts greedily with the current version; recorded with it and in the run directory."""
        if self.eval_data is None:
            return None
        result = evaluate(self.engine, self.version, self.eval_data, self.reward_funcs, self.config)
        save_evaluation(self.run_dir, result)
        self.store.record(self.version, **{f"eval/{name}": value for name, value in result.metrics.items()})
        self.reporter.evaluation(self.steps_done, self.version.number, result.metrics)
        self.evaluations.append(result)
        return result

    def save_model(self, directory: str | Path, which: Literal["last", "best"] = "last") -> AdapterVersion:
        """Write a version as a plain PEFT folder that `PeftModel.from_pretrained` and vLLM load.

        "best" is the version with the highest held-out reward (training reward without held-out prompts).
        """
        version = self.version if which == "last" else self._best()
        self.sync.export(version, Path(directory))
        return version

    def close(self) -> None:
        """Close the view, the store, and the engine if this trainer started it."""
        self._open.close()

    def _step(self) -> None:
        clock = _Clock(self.reporter)
        version, step = self.version, self.steps_done + 1
        with clock("generate"):
            prompts, columns = self.train_data.select(next(self.sampler))
            groups = self._rollout(prompts, step, version)
        with clock("reward"):
            context = RewardContext(TrainerState(step, self.config.total_steps))
            rewards_BF = torch.tensor(score(self.reward_funcs, groups, columns, context))
            names = reward_names(self.reward_funcs)
            rewards_B = weighted_rewards(rewards_BF, self.config.reward_weights)
            advantages_B = group_advantages(rewards_B, self.config.num_generations, self.config.scale_rewards)
        with clock("train"):
            batch = self.policy.prepare(self._batch(groups, advantages_B))
            gap = logprob_gap(batch)
            canary = self._canary(groups, gap, step)
            trained = self.policy.update(batch)
        with clock("publish"):
            self.sync.push(step=step)
        self.steps_done = step
        used = float((advantages_B != 0).view(-1, self.config.num_generations).any(1).float().mean())
        self._without_signal = 0 if used else self._without_signal + 1
        metrics: dict[str, Any] = {
            **reward_metrics(rewards_BF, names, self.config.num_generations, self.config.reward_weights),
            **context.metrics(),
            **_completion_metrics(groups),
            **trained,
            GAP: gap,
            **({"canary/verdict": canary.verdict, "canary/signal": canary.signal} if canary else {}),
            "frac_groups_used": used,
            "version": version.number,
            **clock.seconds,
            "step_time": sum(clock.seconds.values()),
            **self._sync_metrics(),
        }
        self.store.record(version, **{name: value for name, value in metrics.items() if name.startswith("reward")})
        self.history.append(metrics)
        self.reporter.step(step, metrics)
        self._show_samples(step, groups, rewards_B.tolist())

    def _rollout(self, prompts: list[Any], step: int, version: AdapterVersion) -> list[Group]:
        if self.rollout_func is None:
            sampling = training_sampling(self.config, step, self.rollbacks)
            groups = self.engine.generate(prompts, sampling, adapter=version)
        else:
            groups = self.rollout_func(prompts, self.engine, version)
        check_groups(groups, len(prompts), self.config, version)
        return groups

    def _sync_metrics(self) -> dict[str, float]:
        receipt = self.sync.last_receipt
        if receipt is None:
            return {}
        self._sync_s.append(receipt.total_s)
        return {f"sync/{phase}_s": seconds for phase, seconds in receipt.seconds.items()}

    def _batch(self, groups: list[Group], advantages_B: torch.Tensor) -> Batch:
        return Batch.from_groups(
            groups,
            advantages_B,
            pad_token_id=self.pad_token_id,
            mask_truncated_completions=self.config.mask_truncated_completions,
        )

    def _canary(self, groups: list[Group], gap: float, step: int) -> CanaryReport | None:
        """At its cadence, and at once when the batch's own gap is above the noise. Raises when it fails."""
        probe = self.sync.probe
        if probe is None or (step % self.config.canary_every and gap <= RESOLUTION * probe.noise):
            return None
        rows = max(1, CANARY_ROWS // self.config.num_generations)
        return self.sync.canary(groups[:rows], temperature=self.config.temperature)

    def _evaluate_when_due(self) -> None:
        every, last = self.config.eval_every, self.steps_done == self.config.total_steps
        stopped = self._without_signal >= PATIENCE_STEPS
        if stopped:
            self.reporter.message(f"{PATIENCE_STEPS} steps without a group of unequal rewards: nothing left to learn")
        if last or stopped or (every and self.steps_done % every == 0):
            self.evaluate()

    def _show_samples(self, step: int, groups: list[Group], rewards_B: list[float]) -> None:
        every = self.config.log_completions_every
        if every is None or step % every:
            return
        pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
        rows = [
            {"prompt": prompt, "completion": completion.text, "reward": reward, "version": completion.version}
            for (prompt, completion), reward in zip(pairs, rewards_B, strict=True)
        ]
        self.reporter.samples(step, rows[:: max(1, len(rows) // 4)][:4])

    def _best(self) -> AdapterVersion:
        metric = "eval/reward" if self.eval_data is not None else "reward"
        scored = [(self.store.metrics(version.number).get(metric), version) for version in self.store.list()]
        known = [(value, version) for value, version in scored if isinstance(value, int | float)]
        if not known:
            raise ConfigError(f"no version has a recorded {metric!r}; save which='last' instead")
        return max(known, key=lambda pair: pair[0])[1]

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
        gaps = [metrics[GAP] for metrics in self.history if GAP in metrics]
        first, last = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else (None, None)
        return {
            "accuracy_before": first.metrics["reward"] if first else None,
            "accuracy_after": last.metrics["reward"] if last else None,
            "steps": self.steps_done,
            "seconds": round(seconds, 2),
            "sync_median_s": statistics.median(self._sync_s) if self._sync_s else None,
            "logprob_gap_mean": statistics.fmean(gaps) if gaps else None,
            "versions": len(self.store.list()),
            "run": str(self.run_dir),
        }


def logprob_gap(batch: Batch) -> float:
    """Mean |trainer - sampler| log-prob over the tokens in the loss, nats; NaN when the sampler gave none."""
    if batch.old_logp_BT is None:
        raise ValueError("the batch was not prepared")
    known_BT = batch.mask_BT & ~batch.sampler_logp_BT.isnan()
    return float((batch.old_logp_BT - batch.sampler_logp_BT)[known_BT].abs().mean())


class _Clock:
    """Seconds by phase of one step, shown while they pass."""

    def __init__(self, reporter: Reporter) -> None:
        self.seconds: dict[str, float] = {}
        self._reporter = reporter

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._reporter.phase(phase)
        started = time.perf_counter()
        yield
        self.seconds[f"time/{phase}_s"] = time.perf_counter() - started


def _named(model: str | Path | ModelConfig | nn.Module) -> ModelConfig | nn.Module:
    return ModelConfig(name=str(model)) if isinstance(model, str | Path) else model


def _prompts(data: Any, name: str) -> PromptDataset:
    if data is None:
        raise ConfigError(f"{name} is missing: pass a datasets.Dataset, a list of dicts with 'prompt', or a file")
    return data if isinstance(data, PromptDataset) else load_prompts(data)


def _completion_metrics(groups: Sequence[Group]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(completion.truncated for completion in completions) / len(completions),
    }
