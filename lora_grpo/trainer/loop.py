"""A run's loop: step after step, hearing before each what is asked from outside, and after each the guard."""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lora_grpo.engines.delivery.agreement import RESOLUTION, CanaryReport
from lora_grpo.errors import TrainingError, UnknownVersion
from lora_grpo.grpo.advantages import reward_metrics
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.losses import filled, known_gaps
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.log import jsonable
from lora_grpo.metrics.render import BACKLOG, GAP
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.rewards import RewardFunction, reward_names
from lora_grpo.trainer.assembly import Parts, call
from lora_grpo.trainer.rollouts import Rewarded, Rollout
from lora_grpo.trainer.run import Run, apply_requests, guarded, roll_back_between_steps
from lora_grpo.types import Group

CANARY_ROWS = 32
SHOWN = 4  # completions of a step that are logged to be looked at
_OF_THE_VERSION = {"kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "frac_groups_used", GAP}
"""Of a step's metrics, those that say something, as rewards do, of the version that made its completions."""
WARN_EVERY = 10  # steps in a row in which every group's rewards were equal: a run warns after so many, and again


def train(run: Run, reporter: Reporter) -> None:
    while goes_on(run, reporter):
        apply_requests(run.store, partial(roll_back_between_steps, run), reporter)
        with reporter.phase("generate"):
            rollout = run.source.take(run.steps_done + 1)
        finish_step(run, reporter, rollout)


def goes_on(run: Run, reporter: Reporter) -> bool:
    """Whether there is another step; where the run gives up, it says so."""
    if gives_up := _gives_up(run):
        _warn_without_signal(run, reporter, "max_steps_without_signal ends the run here; raise it and resume")
    return not gives_up and run.steps_done < run.config.total_steps


def finish_step(run: Run, reporter: Reporter, rollout: Rollout) -> None:
    """Learn from a sampled batch and publish, then evaluate where that is due; or go back as the guard says."""
    error: TrainingError | None = None
    try:
        _step(run, reporter, rollout)
    except TrainingError as caught:
        error = caught
    if run.guard is not None and (reason := run.guard.why(run.history, error)) is not None:
        guarded(run, run.guard, reason, reporter)
        return
    if error is not None:
        raise error
    if run.without_signal and run.without_signal % WARN_EVERY == 0:
        _warn_without_signal(run, reporter, "max_steps_without_signal would end such a run")
    _evaluate_when_due(run, reporter)


def publish(run: Run, step: int, measured: Mapping[str, Any] | None = None) -> None:
    """The weights after `step` become a version, kept with the trainer's state. That has what the step `measured` too
    (but for times): should the run be killed before that is written down, `make_good` does it."""
    beside_weights = {
        "steps_done": step,
        "rollbacks": run.rollbacks,
        "without_signal": run.without_signal,
        "sampler": run.source.position(),
        "measured": None if measured is None else jsonable(measured),
    }
    run.crew(call, "sync.push", step, extra=beside_weights)


def make_good(run: Run, reporter: Reporter) -> None:
    """What a run that was killed right after publishing owes: its step's metrics, and an evaluation due there."""
    measured, run.owed = run.owed, None
    if measured is None:
        return
    if all(metrics["step"] != measured["step"] for metrics in run.history):
        _record(run, measured)
        run.history.append(measured)
        reporter.step(measured["step"], measured)
    if all(result.version != run.version.number for result in run.evaluations):
        _evaluate_when_due(run, reporter)


def held_out(run: Run, reporter: Reporter) -> None:
    if run.eval_data is not None:
        result = run.evaluate()
        reporter.evaluation(run.steps_done, result.version, result.metrics)


def _step(run: Run, reporter: Reporter, rollout: Rollout) -> None:
    config, source, step = run.config, run.source, run.steps_done + 1
    with reporter.phase("reward"):
        rewarded = source.reward(rollout)
    with reporter.phase("train"):
        learned = run.crew(learn, config, rewarded, step)
    run.steps_done = step
    metrics = {**step_metrics(rewarded, source.reward_funcs, config), **learned, **source.metrics()}
    metrics |= {"step": step, "version": rollout.version.number}
    run.without_signal = 0 if metrics["frac_groups_used"] else run.without_signal + 1
    # Before the next version is published: retention then looks at rewards, and keeps what the best one needs.
    _record(run, metrics)
    with reporter.phase("publish"):
        publish(run, step, metrics)
    metrics |= {**(run.sync.last_receipt.metrics if run.sync.last_receipt else {}), **reporter.seconds}
    metrics |= {BACKLOG: run.store.archive_backlog_bytes, "step_time": sum(reporter.seconds.values())}
    run.history.append(metrics)
    reporter.step(step, metrics)
    if config.log_completions_every and step % config.log_completions_every == 0:
        reporter.samples(step, sample_rows(rewarded))


def _record(run: Run, metrics: Mapping[str, Any]) -> None:
    # A forked run has not the version that its first step was sampled from. One that is sampled from again, after a
    # rollback, keeps what it earned first: by that the best ones were chosen, whose trainer states are there.
    with suppress(UnknownVersion):
        if "reward" not in run.store.metrics(metrics["version"]):
            names = _OF_THE_VERSION | {name for name in metrics if name.startswith("reward")}
            run.store.record(metrics["version"], **{name: metrics[name] for name in metrics if name in names})


def _evaluate_when_due(run: Run, reporter: Reporter) -> None:
    every, last = run.config.eval_every, run.steps_done == run.config.total_steps
    if last or _gives_up(run) or (every and run.steps_done % every == 0):
        held_out(run, reporter)


def _gives_up(run: Run) -> bool:
    most = run.config.max_steps_without_signal
    return most is not None and run.without_signal >= most


def _warn_without_signal(run: Run, reporter: Reporter, then: str) -> None:
    reporter.message(
        f"warning: in the last {run.without_signal} steps every group's rewards were equal, so nothing was learned. "
        "Use prompts that are neither hopeless nor solved, more completions (num_generations, generation_batch_size), "
        f"a higher temperature, or a reward that gives partial credit; {then}"
    )


def learn(parts: Parts, config: GRPOConfig, rewarded: Rewarded, step: int) -> dict[str, Any]:
    """Check the completions' log-probs against the policy's, then update it. Raises `DeliveryError` before updating.
    Called by every process with all completions; each learns from its part of the rows."""
    processes = parts.policy.processes
    rows = Batch.from_groups(rewarded.groups, rewarded.advantages_B, mask_truncated=config.mask_truncated_completions)
    checked: dict[str, Any] = {}

    def judge(prepared: Batch) -> None:
        """The gap is the mean |trainer - sampler| log-prob of all processes' tokens in the loss, NaN without any."""
        gaps_N = known_gaps(filled(prepared.old_logp_BT), prepared.sampler_logp_BT, prepared.mask_BT)
        total, count = processes.sum(torch.stack([gaps_N.sum(), gaps_N.new_tensor(len(gaps_N))])).tolist()
        checked[GAP] = gap = total / count if count else math.nan
        if (report := canary(parts, config, rewarded.groups, gap, step)) is not None:
            checked.update({"canary/verdict": report.verdict, "canary/signal": report.signal})

    own = rows.select(torch.arange(len(rows))[processes.part(len(rows))])
    return {**parts.policy.update(own, judge=judge), **checked}


def canary(parts: Parts, config: GRPOConfig, groups: list[Group], gap: float, step: int) -> CanaryReport | None:
    """At the first step, at its cadence, and when the batch's gap is above the noise. `DeliveryError` if it fails."""
    # A batch of an earlier version is compared with that one's weights; its own gap says nothing.
    number = groups[0].completions[0].version
    late = number is not None and number != parts.sync.head.number
    due = (step - 1) % config.canary_every == 0 or not (late or gap <= RESOLUTION * parts.sync.noise)
    # Noise is each process's own, to rounding, and a canary takes all of them.
    if parts.sync.probe is None or not parts.policy.processes.share(due):
        return None
    chosen, which, rows = spread(groups, CANARY_ROWS), number if late else None, config.per_device_train_batch_size
    return parts.sync.canary(chosen, version=which, temperature=config.temperature, batch_rows=rows)


def spread(groups: list[Group], rows: int) -> list[Group]:
    """About `rows` completions of as many prompts as there are: prompts differ more than samples of one."""
    chosen = groups[:: max(1, len(groups) // rows)][:rows]
    return [replace(group, completions=group.completions[: max(1, rows // len(chosen))]) for group in chosen]


def step_metrics(rewarded: Rewarded, functions: Sequence[RewardFunction], config: GRPOConfig) -> dict[str, Any]:
    """Under TRL's names where it has them."""
    completions = [completion for group in rewarded.groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        **reward_metrics(rewarded.rewards_BF, reward_names(functions), config),
        **rewarded.logged,
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(completion.truncated for completion in completions) / len(completions),
        # Of those whose rewards differ, the only ones that carry signal.
        "frac_groups_used": float((rewarded.advantages_B != 0).view(-1, config.num_generations).any(1).float().mean()),
    }


def sample_rows(rewarded: Rewarded) -> list[dict[str, Any]]:
    pairs = [(group.prompt, completion) for group in rewarded.groups for completion in group.completions]
    rows = [
        {"prompt": prompt, "completion": completion.text, "reward": value, "version": completion.version}
        for (prompt, completion), value in zip(pairs, rewarded.rewards_B.tolist(), strict=True)
    ]
    for column, values in rewarded.extra.items():
        for row, value in zip(rows, values, strict=True):
            row.setdefault(column, value)
    return rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
