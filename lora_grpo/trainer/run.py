"""A run between two steps: taken up again, taken back to a version, and doing what other processes ask of it."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from lora_grpo.adapters.asking.requests import Request, pending
from lora_grpo.adapters.peft_form.modules import peft_model_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import Rollback, RollbackLog, ancestors, of_trainer
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.data import PromptSampler
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError, TrainingError, UnknownVersion, counted
from lora_grpo.metrics.log import Record, history, package_versions, read_metrics
from lora_grpo.metrics.render import GAP
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.reference import kept_reference
from lora_grpo.rollback import RollbackReport
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.assembly import Crew, apply_optimizer_settings, call, led, seed_everything
from lora_grpo.trainer.guards import Guard
from lora_grpo.trainer.overlap import Ahead
from lora_grpo.trainer.preflight import Preflight
from lora_grpo.trainer.rollouts import Evaluation, Source, evaluate, save_evaluation, saved_evaluations

RollBack: TypeAlias = Callable[[Target], RollbackReport]


class Run:
    """What the loop, a rollback and a resume move on; `GRPOTrainer` is one, with the verbs that its user calls."""

    def __init__(self, crew: Crew, made_of: Preflight) -> None:
        config, spec, parts = made_of.config, made_of.spec, crew.parts
        self.config, self.run_dir, self.guard = config, Path(spec.run_dir), spec.guard
        self.crew, self.parts = crew, parts
        self.engine, self.model, self.policy, self.sync = parts.engine, parts.policy.model, parts.policy, parts.sync
        self.eval_data, self.rollback_log = made_of.held_out, RollbackLog(self.run_dir)
        data, prompts = made_of.train, config.rows_per_step(crew.processes.count) // config.num_generations
        sampler, kind = PromptSampler(len(data), prompts, config.seed), Ahead if config.max_staleness else Source
        self.source = kind(config, parts, data, sampler, self.rollback_log, made_of.reward_funcs, spec.rollout_func)
        self.steps_done, self.without_signal, self.taken_up = 0, 0, False
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

    @led
    def resume(self) -> RollbackReport | None:
        """Go on with the run in `run_dir`: weights, optimizer, schedule, random state, step, prompts and `HEAD`.

        It starts from `HEAD`, or from its nearest ancestor whose trainer state reached the archive; None if nothing was
        published. A rollback made while the run was stopped is completed. Raises `ConfigError` if no state was kept.
        """
        head, log = self.store.head, self.rollback_log
        # Read before anything is moved: a damaged log is told of while nothing has changed.
        records = history(read_metrics(self.run_dir))
        if head is None:
            return None
        reference = kept_reference(self.run_dir) if self.config.beta else None
        log.settle(head.number)
        waiting = log.waits_at(head.number)
        report = _put_back(self, head, waiting=waiting)
        self.crew(call, "policy.reference.set", reference)
        extra = of_trainer(report.extra)
        if (position := log.data_position(extra)) is not None:
            self.source.sampler.load_state_dict(position)
        self.crew(apply_optimizer_settings, log.learning_rate_scale)
        idle = 0 if waiting or extra is None else int(extra["without_signal"])
        # What the steps measured, as the run wrote it down: a guard's baseline is what they say.
        self.history = [_metrics_of(record) for record in records if record["event"] == "step"]
        self.take_up(report.version.step, without_signal=idle)
        self.evaluations = [one for one in saved_evaluations(self.run_dir).values() if one.step <= self.steps_done]
        measured = report.extra.get("measured")
        self.owed = measured and _metrics_of(measured)
        self.taken_up = True
        return report

    @led
    def evaluate(self) -> Evaluation:
        """Answer the held-out prompts greedily with the current version, and record the result in the run directory.

        Raises `ConfigError` if there are no held-out prompts.
        """
        if self.eval_data is None:
            raise ConfigError("there are no held-out prompts; pass eval_dataset")
        engine, source = self.parts.rendering, self.source
        result = evaluate(engine, self.version, self.eval_data, source.reward_funcs, self.config, source.score)
        save_evaluation(self.run_dir, result)
        self.store.record(self.version, **{f"eval/{name}": value for name, value in result.metrics.items()})
        self.evaluations.append(result)
        return result

    def take_up(self, step: int, *, without_signal: int) -> None:
        """Count on from `step`; what came after it in the history did not happen."""
        self.steps_done, self.without_signal = step, without_signal
        self.history = [metrics for metrics in self.history if metrics["step"] <= step]


def run_info(run: Run) -> dict[str, Any]:
    return {
        "model": getattr(peft_model_of(run.model).base_model.model.config, "_name_or_path", ""),
        "device": str(run.policy.device),
        "adapter_mib": round(run.sync.adapter_bytes / 2**20, 3),
        "store": str(run.store.root),
        "base_match": run.sync.base_match and str(run.sync.base_match),
        "probe": run.sync.probe and asdict(run.sync.probe),
        "packages": package_versions(),
        "config": run.config.model_dump(mode="json"),
    }


def summary(run: Run, seconds: float) -> dict[str, Any]:
    """Of the whole run, but for `seconds` and the rollouts' counts, which are this process's. `reward_*` are the first
    and the last held-out reward."""
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
        **{f"dropped_{why}": count for why, count in run.source.dropped.items()},
        "run": str(run.run_dir),
    }


def roll_back(run: Run, to: Target, *, reason: str | None = None, learning_rate_factor: float = 1.0) -> RollbackReport:
    """Engine and trainer go on from `to`; data position and learning rate are written down before `HEAD` moves."""
    log, version = run.rollback_log, run.store.get(to)
    run.source.drop("rollback")
    scale, sampler = log.learning_rate_scale * learning_rate_factor, run.source.sampler.state_dict()
    with log.written(Rollback(run.version.number, version.number, sampler, scale, reason, time.time())):
        report: RollbackReport = run.crew(call, "sync.rollback", version.number)
    run.crew(apply_optimizer_settings, scale)
    run.take_up(version.step, without_signal=0)
    return report


def roll_back_between_steps(run: Run, to: Target) -> RollbackReport:
    """As another process asks for it: the trainer is at `HEAD` then, so that going there would change nothing."""
    if run.store.get(to) != run.version:
        return roll_back(run, to)
    return RollbackReport(run.version, run.version, "exact", "kept", "kept", "kept", {})


def answer_requests(sync: NativeSync) -> None:
    """Do what `lora-grpo rollback`, `pin`, `unpin` and `prune` ask of the run that `sync`'s store holds.

    Call it before each step, in every process, when no completions wait to be trained on. The result of a request goes
    to the process that asked, to stderr and to RUN/metrics.jsonl. A request that fails changes nothing.

    >>> for step in range(2):
    ...     answer_requests(sync)
    ...     version = sync.push(step=step)
    """

    def heard(roll_back: RollBack) -> None:
        run = sync.store.archive
        if run is not None and pending(run):
            with Reporter(run, total_steps=0) as reporter:
                apply_requests(sync.store, roll_back, reporter)

    sync.processes.lead(heard, sync.rollback)


def apply_requests(store: AdapterStore, roll_back: RollBack, reporter: Reporter) -> None:
    """In order. A request that cannot be done changes nothing, and its answer says why."""
    for request in pending(store.archive):
        if not request.claim():
            continue
        try:
            result = _apply(store, roll_back, request)
        except LoraGrpoError as error:
            result = {"error": str(error), "kind": type(error).__name__}
        except BaseException as error:
            request.answer({"error": f"{type(error).__name__}: {error}", "kind": EngineError.__name__})
            raise
        request.answer(result)
        asked = " ".join(map(str, [request.verb, *request.args.values()]))
        said = f"asked from outside: {asked}: {result.get('error') or result['done']}"
        if result.get("left") != result.get("version"):
            reporter.rollback(result["step"], said)
        else:
            reporter.message(said)


def _apply(store: AdapterStore, roll_back: RollBack, request: Request) -> dict[str, Any]:
    match request.verb, request.args:
        case "rollback", {"to": to}:
            report = roll_back(to)
            found = {"version": report.version.number, "step": report.version.step, "left": report.left.number}
            return {"done": str(report), **found, "weights": report.weights}
        case "pin" | "unpin" as verb, {"version": version}:
            getattr(store, verb)(version)
            return {"done": f"{verb}ned", "pins": sorted(store.pins)}
        case "prune", _:
            removed = store.prune()
            return {"done": f"removed {counted(len(removed), 'version')} from tmpfs", "removed": removed}
    known = "rollback (to), pin and unpin (version), and prune"
    raise ConfigError(f"request {request.name} asks for {request.verb!r} with {request.args}; known are {known}")


def guarded(run: Run, guard: Guard, reason: str, reporter: Reporter) -> None:
    """Roll back as `guard` says, and write down why. Raises `TrainingError` when it did so often enough before."""
    run.store.record(run.version, guard=reason)
    reasons = [*run.rollback_log.reasons, reason]
    if len(reasons) > guard.max_rollbacks:
        listed = "; ".join(f"({index}) {text}" for index, text in enumerate(reasons, 1))
        raise TrainingError(f"the guard has rolled back {guard.max_rollbacks} times and would do it again: {listed}")
    try:
        report = roll_back(run, guard.to, reason=reason, learning_rate_factor=guard.learning_rate_factor)
    except UnknownVersion as nowhere:
        raise TrainingError(f"{reason}; and the guard has no version to go back to: {nowhere}") from nowhere
    scale = run.rollback_log.learning_rate_scale
    reporter.rollback(report.version.step, f"guard: {reason}: {report}; learning rate at {scale:g} times its setting")


def _put_back(run: Run, head: AdapterVersion, *, waiting: bool) -> RollbackReport:
    """Engine and trainer at the version to go on from; `waiting`: a rollback to `head` is to be completed."""
    if "state" not in run.store.where(head.number):
        if head.step == 0 and run.crew(call, "sync.adopt", head):
            # Killed before its first state was written, it begins again.
            run.crew(seed_everything, run.config.seed)
            return RollbackReport(head, head, "exact", "kept", "kept", "reset", {})
        if waiting:
            # A rounded rollback keeps schedule and random state where they were: with the version that was left.
            left = _nearest_state(run.store, run.rollback_log.entries[-1].left)
            if left is not None:
                run.crew(call, "sync.restore_trainer", run.store.get(left))
            report = run.crew(call, "sync.rollback", head.number)
            return report if left is not None else replace(report, scheduler="reset", random_state="reset")
    number = _nearest_state(run.store, head.number)
    if number is None:
        told = f"{run.run_dir} kept no trainer state of {head} or its ancestors, so it cannot be resumed exactly"
        fix = f"`lora-grpo rollback {run.run_dir} --to {head.number}` and resume go on from its rounded weights"
        raise ConfigError(f"{told}; {fix}")
    return run.crew(call, "sync.rollback", number)


def _nearest_state(store: AdapterStore, number: int) -> int | None:
    """The version, or the nearest of its ancestors, whose trainer state is kept; those between may be gone."""
    kept = {*store.states} & {*store.numbers}
    return next((one for one in ancestors(store, number) if one in kept), None)


def _metrics_of(record: Record) -> dict[str, Any]:
    """A logged step's metrics; the log holds what is not finite as null."""
    measured = {name: value for name, value in record.items() if name not in ("event", "time")}
    return {name: math.nan if value is None else value for name, value in measured.items()}
