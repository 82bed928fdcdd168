"""A run's loop: step after step, hearing before each what is asked from outside, and after each the guard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from lora_grpo.errors import ConfigError, TrainingError, UnknownVersion
from lora_grpo.metrics.render import BACKLOG
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.trainer import going_back
from lora_grpo.trainer.crew import push
from lora_grpo.trainer.evaluation import Evaluation, save_evaluation
from lora_grpo.trainer.evaluation import evaluate as answered
from lora_grpo.trainer.rollouts import Rollout
from lora_grpo.trainer.run import Run
from lora_grpo.trainer.steering import apply_requests
from lora_grpo.trainer.stepping import Clock, learn, of_the_version, sample_rows, step_metrics

WARN_EVERY = 10
"""Steps in a row without any signal (every group's rewards equal) after which, and again after as many, a run warns."""


def train(run: Run, reporter: Reporter) -> None:
    """Step until `total_steps`, or for `max_steps_without_signal` steps in a row that taught nothing."""
    while goes_on(run, reporter):
        apply_requests(run.store, partial(going_back.roll_back_between_steps, run), reporter)
        clock = Clock(reporter)
        with clock("generate"):
            rollout = run.source.take(run.steps_done + 1)
        finish_step(run, reporter, clock, rollout)


def goes_on(run: Run, reporter: Reporter) -> bool:
    """Whether there is another step; where the run gives up, it says so."""
    if _gives_up(run):
        _warn_without_signal(run, reporter, "max_steps_without_signal ends the run here; raise it and resume")
        return False
    return run.steps_done < run.config.total_steps


def finish_step(run: Run, reporter: Reporter, clock: Clock, rollout: Rollout) -> None:
    """Learn from a sampled batch and publish, then evaluate where that is due; or go back as the guard says."""
    if _guarded_step(run, reporter, clock, rollout):
        if run.without_signal and run.without_signal % WARN_EVERY == 0:
            _warn_without_signal(run, reporter, "max_steps_without_signal would end such a run")
        _evaluate_when_due(run, reporter)


def publish(run: Run, step: int, measured: Mapping[str, Any] | None = None) -> None:
    """The weights after `step` become a version, which is proven, promoted, and kept with the trainer's state.

    The state has what the step `measured` too (but for times): should the run be killed before that is written down,
    `make_good` does it.
    """
    run.crew(push, step, going_back.state_for(run, step, measured))


def make_good(run: Run, reporter: Reporter) -> None:
    """What a run that was killed right after publishing still owes: its step's metrics, and an evaluation due there."""
    measured, run.owed = run.owed, None
    if measured is None:
        return
    if all(metrics["step"] != measured["step"] for metrics in run.history):
        _write_down(run, reporter, measured)
    if all(result.version != run.version.number for result in run.evaluations):
        _evaluate_when_due(run, reporter)


def evaluate(run: Run) -> Evaluation:
    """See `GRPOTrainer.evaluate`."""
    if run.eval_data is None:
        raise ConfigError("there are no held-out prompts; pass eval_dataset")
    source = run.source
    engine, functions = run.parts.rendering, source.reward_funcs
    result = answered(engine, run.version, run.eval_data, functions, run.config, source.score)
    save_evaluation(run.run_dir, result)
    run.store.record(run.version, **{f"eval/{name}": value for name, value in result.metrics.items()})
    run.evaluations.append(result)
    return result


def held_out(run: Run, reporter: Reporter) -> None:
    """Evaluate and report, where there are held-out prompts."""
    if run.eval_data is not None:
        result = evaluate(run)
        reporter.evaluation(run.steps_done, result.version, result.metrics)


def _guarded_step(run: Run, reporter: Reporter, clock: Clock, rollout: Rollout) -> bool:
    """The rest of a step; False when the guard went back instead. Raises what it is not set to catch."""
    if run.guard is None:
        _step(run, reporter, clock, rollout)
        return True
    error: TrainingError | None = None
    try:
        _step(run, reporter, clock, rollout)
    except TrainingError as caught:
        error = caught
    reason = run.guard.why(run.history, error)
    if reason is None and error is not None:
        raise error
    if reason is not None:
        going_back.guarded(run, run.guard, reason, reporter)
    return reason is None


def _step(run: Run, reporter: Reporter, clock: Clock, rollout: Rollout) -> None:
    config, source, step = run.config, run.source, run.steps_done + 1
    with clock("reward"):
        rewarded = source.reward(rollout)
    with clock("train"):
        learned = run.crew(learn, config, rewarded, step)
    run.steps_done = step
    run.without_signal = 0 if rewarded.used_groups(config.num_generations) else run.without_signal + 1
    metrics = {
        **step_metrics(rewarded, source.reward_funcs, config),
        **learned,
        **source.metrics(),
        "step": step,
        "version": rollout.version.number,
    }
    with clock("publish"):
        publish(run, step, metrics)
    metrics |= {**(run.sync.last_receipt.metrics if run.sync.last_receipt else {}), **clock.seconds}
    metrics |= {BACKLOG: run.store.archive_backlog_bytes, "step_time": sum(clock.seconds.values())}
    _write_down(run, reporter, metrics)
    if config.log_completions_every and step % config.log_completions_every == 0:
        reporter.samples(step, sample_rows(rewarded))


def _write_down(run: Run, reporter: Reporter, metrics: dict[str, Any]) -> None:
    # A forked run has not the version that its first step was sampled from. One that is sampled from again, after a
    # rollback, keeps what it earned first: by that the best ones were chosen, whose trainer states are there.
    with suppress(UnknownVersion):
        known = run.store.metrics(metrics["version"])
        if "reward" not in known:
            run.store.record(metrics["version"], **of_the_version(metrics))
    run.history.append(metrics)
    reporter.step(metrics["step"], metrics)


def _evaluate_when_due(run: Run, reporter: Reporter) -> None:
    every, last = run.config.eval_every, run.steps_done == run.config.total_steps
    if last or _gives_up(run) or (every and run.steps_done % every == 0):
        held_out(run, reporter)


def _gives_up(run: Run) -> bool:
    most = run.config.max_steps_without_signal
    return most is not None and run.without_signal >= most


def _warn_without_signal(run: Run, reporter: Reporter, then: str) -> None:
    reporter.message(
        f"warning: in the last {run.without_signal} steps every group's rewards were equal, "
        "so nothing was learned. Use prompts that are neither hopeless nor solved, more completions (num_generations) "
        "or prompts a step (generation_batch_size), a higher temperature, or a reward that gives partial credit; "
        f"{then}"
    )
