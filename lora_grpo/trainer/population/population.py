"""`Population`: many runs on one engine and one base, a step of each at a time, all completions in one batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.requests import sampling_by_prompt
from lora_grpo.engines.wrapped import RenderingEngine
from lora_grpo.errors import ConfigError, EngineError
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.trainer.assembly import launched
from lora_grpo.trainer.models import Shared, Sharing, check_same_device, load_base, shared_base
from lora_grpo.trainer.population.member import Member
from lora_grpo.trainer.preflight import MemberSpec, Preflight
from lora_grpo.trainer.rollouts import Rollout
from lora_grpo.trainer.room import Room, Wanted, plan_room
from lora_grpo.trainer.run import Run
from lora_grpo.types import Prompt, Sampling


class Population(AbstractContextManager["Population"]):
    """Runs that share an engine and a base. Each is a complete run: run directory, seeds, versions, guard.

    >>> configs = {f"runs/lr-{rate:g}": GRPOConfig(learning_rate=rate, total_steps=2) for rate in (1e-5, 1e-4)}
    >>> members = [MemberSpec(run, reward, config, rows, peft_config=lora) for run, config in configs.items()]
    >>> with Population(base, members) as population:
    ...     [(member.name, member.result["steps"]) for member in population.train()]
    [('lr-1e-05', 2), ('lr-0.0001', 2)]

    A round is one step of every running member: the prompts of all are completed in one batch of the engine, each row
    by its own member's version; then each member scores, learns and publishes. What one member raises ends it alone.
    """

    def __init__(
        self,
        model: str | Path | ModelConfig,
        members: Sequence[MemberSpec],
        *,
        engine: Engine | None = None,
        engine_config: EngineConfig | None = None,
        at_once: int | Literal["fitting"] | None = None,
        share_base_weights: Sharing = "auto",
    ) -> None:
        """Check every member, then start the engine with slots for `at_once` of them (default: all), and load the base.

        If there are more members than `at_once`, the others start when some have ended; with "fitting", as many run at
        once as memory can hold. An `engine` that you give stays open. `share_base_weights` is as in `GRPOTrainer`.
        Raises `ConfigError` for a member that cannot work, or if memory is too small for `at_once` members; then it
        says how many fit.
        """
        if launched() is not None:
            raise ConfigError("a population is one process: start it without accelerate launch or torchrun")
        self._engine_config = config = engine_config or EngineConfig()
        if config.store_address is not None:
            raise ConfigError(f"store_address={config.store_address!r} is for one run: leave it out, and share a disk")
        if not members:
            raise ConfigError("a population needs at least one member")
        if at_once not in (None, "fitting") and (not isinstance(at_once, int) or at_once < 1):
            raise ConfigError(f"at_once={at_once!r} must be a whole number from 1 on, 'fitting', or None (all members)")
        self._model = ModelConfig(name=str(model)) if isinstance(model, str | Path) else model
        self.members: list[Member] = []
        self._resume = False
        wanted = [self._admit(spec) for spec in members]
        planned = partial(plan_room, self._model, wanted, config, share_base_weights, starts=engine is None)
        self.at_once = min(len(members), at_once) if isinstance(at_once, int) else len(members)
        if at_once == "fitting":
            self.at_once = max(1, planned(self.at_once).fit)
        self.room = planned(self.at_once)
        self.room.require()
        with ExitStack() as self._closing:  # closes what is open already when a part fails
            self._shared = self._start(engine, self.room, share_base_weights)
            self._closing = self._closing.pop_all()

    def train(self) -> list[Member]:
        """Train every member to its end. Raises a member's error only if all members failed; see `Member.error`."""
        for _ in self.rounds():
            pass
        failed = [member.error for member in self.members if member.error is not None]
        if len(failed) == len(self.members):
            raise failed[0]
        return self.members

    def rounds(self, begin: Callable[[list[Member]], list[Member]] = lambda running: running) -> Iterator[int]:
        """Yield the number of each round, from 1, when it is done. Every running member is then between two steps.

        Before the next round you may stop and add members, and use their trainers inside `Member.turn`. `begin` gets
        the running members before each round, and returns those that make a step.
        """
        number = 0
        while self.start_waiting():
            members = begin(self.running)
            self._each(members, Member.draw)
            self._sample([member for member in members if member.state == "running"])
            self._each(members, Member.learn)
            number += 1
            yield number

    def start_waiting(self) -> bool:
        """Start waiting members while there are places, as `rounds` does; returns whether any member runs."""
        for member in [member for member in self.members if member.state == "waiting"]:
            if len(self.running) == self.at_once:
                break
            held = [member for member in self.members if member.trainer is not None]
            finished = [member for member in held if member.state == "finished"]
            if finished and len(held) >= self.at_once:
                # It keeps its trainer until another needs its place.
                finished[0].close()
            with self._ending(member):
                member.start(self._model, self._shared, resume=self._resume)
        return bool(self.running)

    def resume(self) -> None:
        """Continue every member from its run directory, if there is a run in it."""
        self._resume = True

    def stop(self, member: Member, why: str) -> None:
        """End a running or waiting member. Its place is free from the next round on, and its run can be resumed."""
        if member.state not in ("running", "waiting"):
            raise ConfigError(f"{member.name} is {member.state}; only a member that runs or waits can be stopped")
        member.stop(why)

    def add(self, spec: MemberSpec) -> Member:
        """Add a member, which starts as soon as there is a place. Raises `ConfigError` if the engine's slots do not fit
        its adapter's rank or layers."""
        self.room.check(self._model, spec.peft_config, self.engine)
        self._admit(spec)
        return self.members[-1]

    @property
    def running(self) -> list[Member]:
        return [member for member in self.members if member.state == "running"]

    @property
    def engine(self) -> Engine:
        return self._shared.engine

    def close(self) -> None:
        """Close every run in its current state, and the engine if this population started it."""
        with self._closing as closing:
            for member in self.members:
                closing.callback(member.close)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self, spec: MemberSpec) -> Wanted:
        """Have a new member wait, checked as far as its own settings go; what it needs."""
        own = Path(spec.run_dir).resolve()
        if there := [one.run_dir for one in self.members if spec.name == one.name or own == one.run_dir.resolve()]:
            raise ConfigError(f"{spec.run_dir}: {there[0]} is already a member; give each a directory of another name")
        try:
            if ahead := spec.config.max_staleness:
                raise ConfigError(f"max_staleness={ahead}: a population samples for all members at once; set it to 0")
            before = Preflight(self._model, spec, engine_config=self._engine_config)
            before.check()
        except ConfigError as error:
            raise ConfigError(f"member {spec.name}: {error}") from error
        self.members.append(Member(before.spec))
        return before.wanted

    def _start(self, engine: Engine | None, room: Room, sharing: Sharing) -> Shared:
        """The engine and the base; what the libraries say meanwhile goes to the first member's log."""
        with Reporter(self.members[0].run_dir, 0, view=False) as reporter, reporter.capture():
            reporter.message(f"memory: {room}")
            if engine is None:
                engine = room.start(self._model, sharing)
                self._closing.callback(engine.close)
            base = shared_base(sharing, self._model, engine, reporter.message) or load_base(self._model)
            check_same_device(base, engine)
        return Shared(engine, base, room.checkpointing)

    def _each(self, members: Sequence[Member], do: Callable[[Member], None]) -> None:
        for member in members:
            if member.state == "running":
                with self._ending(member), member.turn():
                    do(member)

    def _sample(self, members: Sequence[Member]) -> None:
        """All without a `rollout_func` together; if that fails, each by itself: it ends those alone whose rows fail."""
        joint = [member for member in members if member.spec.rollout_func is None]
        together = len(joint) > 1
        if together:
            with ExitStack() as clocks:
                for member in joint:
                    clocks.enter_context(member.reporter.phase("generate"))
                try:
                    sample_together(self.engine, [(member.runs, member.rollout) for member in joint])
                except Exception as error:  # noqa: BLE001 - raised again by the member whose rows fail by themselves too
                    together = False
                    for member in joint:
                        member.reporter.message(f"the batch of all members failed, so each samples alone: {error}")
        for member in members:
            with self._ending(member), member.turn():
                if together and member in joint:
                    member.runs.source.check(member.rollout)
                else:
                    hold(self.engine, [member.runs])
                    with member.reporter.phase("generate"):
                        member.runs.source.sample(member.rollout, member.runs.version)

    @contextmanager
    def _ending(self, member: Member) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a member's functions raise is its own end
            member.fail(error)


def sample_together(engine: Engine, waiting: Sequence[tuple[Run, Rollout]]) -> None:
    """As each trainer alone would have: same seeds, settings and version. What came is for each trainer to check."""
    prompts: list[Prompt] = []
    sampling: list[Sampling] = []
    for run, rollout in waiting:
        rollout.version, asked = run.version, run.parts.rendering
        own: Sequence[Prompt] = rollout.prompts
        sampled_as = sampling_by_prompt(run.source.sampling(rollout), len(own))
        if isinstance(asked, RenderingEngine):
            own, sampled_as = asked.rendered(own, sampled_as)
        prompts += own
        sampling += sampled_as
    hold(engine, [run for run, _ in waiting])
    versions = [rollout.version for _, rollout in waiting for _ in rollout.prompts]
    groups = iter(engine.generate(prompts, sampling, adapter=versions))
    for _, rollout in waiting:
        made = islice(groups, len(rollout.prompts))
        rollout.groups = [replace(group, prompt=prompt) for group, prompt in zip(made, rollout.prompts, strict=False)]


def hold(engine: Engine, runs: Sequence[Run]) -> None:
    """Have versions served again whose place others took. Raises `EngineError` where there are too few places."""
    for _ in range(len(runs) + 1):
        loaded = engine.loaded()
        missing = [run for run in runs if run.version not in loaded]
        if not missing:
            return
        missing[0].sync.serve()
    raise EngineError(f"the engine holds {len(engine.loaded())} versions at a time, and {len(runs)} members need one")
