"""A member of a population: a run of its own, driven a step at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lora_grpo.config import ModelConfig
from lora_grpo.metrics.log import ENGINE_LOG, quiet_libraries
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.state import generator_states, set_generator_states
from lora_grpo.trainer import loop
from lora_grpo.trainer.build import begin_run
from lora_grpo.trainer.grpo_trainer import GRPOTrainer
from lora_grpo.trainer.models import Shared
from lora_grpo.trainer.preflight import MemberSpec
from lora_grpo.trainer.rollouts import Evaluation, Rollout
from lora_grpo.trainer.run import apply_requests, roll_back_between_steps


class Member:
    """`trainer` is there while the member runs, and after it has finished until it is closed. `history` and
    `evaluations` are the steps' metrics and the held-out results so far. `why` says what ended a member that did not
    finish, `error` is what it raised; `result` is the summary of one that did."""

    def __init__(self, spec: MemberSpec) -> None:
        self.spec, self.name, self.run_dir = spec, spec.name, Path(spec.run_dir)
        self.state: Literal["waiting", "running", "finished", "stopped", "failed"] = "waiting"
        self.why: str | None = None
        self.error: Exception | None = None
        self.result: dict[str, Any] | None = None
        self.trainer: GRPOTrainer | None = None
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[Evaluation] = []
        self._random: Any = None
        self._at_work, self._session = False, ExitStack()
        self.reporter: Reporter

    @property
    def runs(self) -> GRPOTrainer:
        """The trainer of a member that is running. Raises `RuntimeError` for any other."""
        if self.trainer is None:
            raise RuntimeError(f"{self.name} has no trainer: it is {self.state}")
        return self.trainer

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While inside, its random state is in place, and libraries write to its log. What is done to its trainer from
        outside the population is done inside (`trainer.rollback` sees to it itself)."""
        quiet = quiet_libraries(self.runs.run_dir / ENGINE_LOG, self.reporter.message)
        with self._own_random_state(), quiet:
            yield

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """While inside, torch, numpy and Python draw for this member alone, as if nobody had drawn in between."""
        if self._at_work:
            yield
            return
        outside, self._at_work = generator_states(), True
        if self._random is not None:
            set_generator_states(self._random)
        try:
            yield
        finally:
            self._random, self._at_work = generator_states(), False
            set_generator_states(outside)

    def start(self, model: ModelConfig, shared: Shared, *, resume: bool) -> None:
        with self._own_random_state(), quiet_libraries(self.run_dir / ENGINE_LOG):
            self.trainer = begin_run(model, self.spec, resume=resume, view=False, shared=shared)
            self.trainer.at_work = self._own_random_state
            self.history, self.evaluations = self.trainer.history, self.trainer.evaluations
            self.reporter = self._session.enter_context(self.trainer.running())
        self.state = "running"
        self.settle()

    def draw(self) -> None:
        trainer = self.runs
        apply_requests(trainer.store, partial(roll_back_between_steps, trainer), self.reporter)
        self.rollout: Rollout = trainer.source.draw(trainer.steps_done + 1)

    def learn(self) -> None:
        loop.finish_step(self.runs, self.reporter, self.rollout)
        self.settle()

    def settle(self) -> None:
        trainer = self.runs
        self.history, self.evaluations = trainer.history, trainer.evaluations
        if not loop.goes_on(trainer, self.reporter):
            self._leave(None)
            self.result, self.state = trainer.result, "finished"

    def fail(self, error: Exception) -> None:
        self.error, self.why, self.state = error, f"{type(error).__name__}: {error}", "failed"
        try:
            self._leave(error)
            self.close()
        except Exception as later:  # noqa: BLE001 - the first error is what ended it, and it ends nobody else
            error.add_note(f"closing {self.run_dir} failed too: {type(later).__name__}: {later}")

    def stop(self, why: str) -> None:
        if self.state == "running":
            self.reporter.message(f"stopped: {why}")
        self.state, self.why = "stopped", why
        self.close()

    def close(self) -> None:
        """Give its memory and its versions' places back. A second call does nothing."""
        self._leave(GeneratorExit())
        if self.trainer is not None:
            self.trainer.close()
            self.trainer = None

    def _leave(self, error: BaseException | None) -> None:
        self._session.__exit__(None if error is None else type(error), error, None)
