"""A run's loop: step after step, hearing before each what is asked from outside, and after each the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_grpo.errors import TrainingError
from lora_grpo.metrics import Reporter
from lora_grpo.metrics.render import BACKLOG
from lora_grpo.trainer import going_back
from lora_grpo.trainer.crew import push
from lora_grpo.trainer.steering import apply_requests
from lora_grpo.trainer.stepping import Clock, learn, of_the_version, sample_rows, step_metrics

if TYPE_CHECKING:
    from lora_grpo.trainer.grpo_trainer import GRPOTrainer
    from lora_grpo.trainer.overlap import Rollout

WARN_EVERY = 10
"""Steps in a row without any signal (every group's rewards equal) after which, and again after as many, a run warns."""


def run(trainer: GRPOTrainer, reporter: Reporter) -> None:
    """Step until `total_steps`, or for `max_steps_without_signal` steps in a row that taught nothing."""
    while goes_on(trainer, reporter):
        apply_requests(trainer.store, trainer.rollback, reporter)
        clock = Clock(reporter)
        with clock("generate"):
            rollout = trainer.rollouts.take(trainer.steps_done + 1)
        finish_step(trainer, reporter, clock, rollout)


def goes_on(trainer: GRPOTrainer, reporter: Reporter) -> bool:
    """Whether there is another step; where the run gives up, it says so."""
    if _gives_up(trainer):
        _warn_without_signal(trainer, reporter, "max_steps_without_signal ends the run here; raise it and resume")
        return False
    return trainer.steps_done < trainer.config.total_steps


def finish_step(trainer: GRPOTrainer, reporter: Reporter, clock: Clock, rollout: Rollout) -> None:
    """Learn from a sampled batch and publish, then evaluate where that is due; or go back as the guard says."""
    if _guarded_step(trainer, reporter, clock, rollout):
        if trainer.without_signal and trainer.without_signal % WARN_EVERY == 0:
            _warn_without_signal(trainer, reporter, "max_steps_without_signal would end such a run")
        _evaluate_when_due(trainer, reporter)


def publish(trainer: GRPOTrainer, step: int) -> None:
    """The weights after `step` become a version, which is proven, promoted, and kept with the trainer's state."""
    trainer.crew(push, step, going_back.state_for(trainer, step))


def held_out(trainer: GRPOTrainer, reporter: Reporter) -> None:
    """Evaluate and report, where there are held-out prompts."""
    if trainer.eval_data is not None:
        result = trainer.evaluate()
        reporter.evaluation(trainer.steps_done, result.version, result.metrics)


def _guarded_step(trainer: GRPOTrainer, reporter: Reporter, clock: Clock, rollout: Rollout) -> bool:
    """The rest of a step; False when the guard went back instead. Raises what it is not set to catch."""
    if trainer.guard is None:
        _step(trainer, reporter, clock, rollout)
        return True
    error: TrainingError | None = None
    try:
        _step(trainer, reporter, clock, rollout)
    except TrainingError as caught:
        error = caught
    reason = trainer.guard.why(trainer.history, error)
    if reason is None and error is not None:
        raise error
    if reason is not None:
        going_back.guarded(trainer, trainer.guard, reason, reporter)
    return reason is None


def _step(trainer: GRPOTrainer, reporter: Reporter, clock: Clock, rollout: Rollout) -> None:
    config, rollouts, step = trainer.config, trainer.rollouts, trainer.steps_done + 1
    with clock("reward"):
        rewarded = rollouts.reward(rollout)
    with clock("train"):
        learned = trainer.crew(learn, config, rewarded, step)
    trainer.steps_done = step
    trainer.without_signal = 0 if rewarded.used_groups(config.num_generations) else trainer.without_signal + 1
    with clock("publish"):
        publish(trainer, step)
    metrics = {
        **step_metrics(rewarded, trainer.reward_funcs, config, trainer.sync.last_receipt),
        **learned,
        **rollouts.metrics(),
        BACKLOG: trainer.store.archive_backlog_bytes,
        "step": step,
        "version": rollout.version.number,
        **clock.seconds,
        "step_time": sum(clock.seconds.values()),
    }
    trainer.store.record(rollout.version, **of_the_version(metrics))
    trainer.history.append(metrics)
    reporter.step(step, metrics)
    if config.log_completions_every and step % config.log_completions_every == 0:
        reporter.samples(step, sample_rows(rewarded))


def _evaluate_when_due(trainer: GRPOTrainer, reporter: Reporter) -> None:
    every, last = trainer.config.eval_every, trainer.steps_done == trainer.config.total_steps
    if last or _gives_up(trainer) or (every and trainer.steps_done % every == 0):
        held_out(trainer, reporter)


def _gives_up(trainer: GRPOTrainer) -> bool:
    most = trainer.config.max_steps_without_signal
    return most is not None and trainer.without_signal >= most


def _warn_without_signal(trainer: GRPOTrainer, reporter: Reporter, then: str) -> None:
    reporter.message(
        f"warning: in the last {trainer.without_signal} steps every group's rewards were equal, "
        "so nothing was learned. Use prompts that are neither hopeless nor solved, more completions (num_generations) "
        "or prompts a step (generation_batch_size), a higher temperature, or a reward that gives partial credit; "
        f"{then}"
    )
