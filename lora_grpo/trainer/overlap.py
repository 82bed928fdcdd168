"""A step's batch, sampled ahead of its turn while earlier steps are trained.

The rollout of step t begins once version t - 1 - max_staleness is promoted, on the newest version there is by then; so
it lags by `max_staleness` at most. Timing decides on the versions, so such a run does not repeat bit by bit."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import ancestors
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.wrapped import OwnedEngine
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError, RewardError, counted
from lora_grpo.trainer.rollouts import Rewarded, Rollout, Source, T
from lora_grpo.worker import Job, Worker


@dataclass
class Flight:
    rollout: Rollout
    groups: Job[None] = field(init=False)
    rewards: Job[Rewarded] | None = None  # there when `groups` is done
    leased: bool = False


@dataclass
class Ahead(Source):
    """Two threads: `generator` samples, `reward` scores; what fails there is raised by `take` or `reward` in the
    trainer's. Versions stay on tmpfs from the start of their rollout to the end of the step that trains on it."""

    def __post_init__(self) -> None:
        self._sync = self.parts.sync
        if self._sync.processes.count > 1:
            raise ConfigError("max_staleness > 0 is for one trainer process; set max_staleness=0")
        wait_s, engine, self._most = self.config.stall_timeout_s, self.parts.engine, self.config.max_staleness
        self._own_generator = not isinstance(engine, OwnedEngine)
        self._generator = engine.worker if isinstance(engine, OwnedEngine) else Worker("generator", patience_s=wait_s)
        self._rewarder = Worker("reward", patience_s=wait_s, failure=RewardError)
        self._ahead: deque[Flight] = deque()
        self._taken: Flight | None = None
        self._lag = 0
        self.dropped = {"stale": 0, "rollback": 0}

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (hasattr(error, "__notes__") or self._generator.hangs):
                error.add_note(f"the trainer failed here; {self._where()}")
            raise
        finally:
            self._forget()

    def take(self, step: int) -> Rollout:
        """A batch that lags too far behind is dropped, with what was begun behind it, and sampled again."""
        self._let_go(self._taken)
        self._taken = None
        while True:
            for following in range(step + len(self._ahead), min(step + self._most, self.config.total_steps) + 1):
                self._begin(self.draw(following))
            flight = self._ahead[0]
            self._wait(self._generator, flight.groups)
            lag = lag_behind(self._sync.store, self._sync.head, flight.rollout.version, self._most)
            if lag is not None:
                self._lag, self._taken = lag, self._ahead.popleft()
                return flight.rollout
            self.drop("stale")

    def reward(self, rollout: Rollout) -> Rewarded:
        if self._taken is None or self._taken.rollout is not rollout or self._taken.rewards is None:
            raise ValueError("only the rollout that was taken last has rewards")
        return self._wait(self._rewarder, self._taken.rewards)

    def score(self, function: Callable[[], T]) -> T:
        return self._wait(self._rewarder, self._rewarder.submit(function))

    def metrics(self) -> dict[str, float]:
        """Under TRL's names; the counts are of completions, over the whole run of this process."""
        lag, rows = float(self._lag), self.config.rows_per_step(1)
        counts = {f"sample/dropped_{why}_total": float(count * rows) for why, count in self.dropped.items()}
        return {"sample/staleness_mean": lag, "sample/staleness_max": lag, **counts}

    def position(self) -> dict[str, int]:
        return self._ahead[0].rollout.position if self._ahead else self.sampler.state_dict()

    def drop(self, why: str) -> None:
        self.dropped[why] += self._forget()

    def close(self) -> None:
        """Stop and end the threads. A reward that hangs is left to itself, as it cannot be interrupted."""
        self._forget()
        self._rewarder.end()
        if self._own_generator:
            self._generator.end()
            self._generator.join()

    def _begin(self, rollout: Rollout) -> None:
        sync, earned, flight = self._sync, super().reward, Flight(rollout)

        def generate() -> None:
            rollout.version, flight.leased = sync.store.acquire(sync.head), True
            self.sample(rollout, rollout.version)
            flight.rewards = self._rewarder.submit(lambda: earned(rollout))

        flight.groups = self._generator.submit(generate)
        self._ahead.append(flight)

    def _forget(self) -> int:
        """Stop and let go of all that is under way, and put the data back; how many rollouts those were."""
        flights, position = list(self._ahead), self.position()
        self._ahead.clear()
        for flight in flights:
            flight.groups.stop()
            if flight.rewards is not None:
                flight.rewards.stop()
            self._let_go(flight)
        self._let_go(self._taken)
        self._taken = None
        self.sampler.load_state_dict(position)
        return len(flights)

    def _let_go(self, flight: Flight | None) -> None:
        """End its lease, now or when it has stopped."""

        def release(_: object) -> None:
            if flight is not None and flight.leased:
                flight.leased = False
                self._sync.store.release(flight.rollout.version)

        if flight is not None:
            flight.groups.result.add_done_callback(release)

    def _wait(self, worker: Worker, job: Job[T]) -> T:
        """Names the culprit of what the job raises; what is none of ours becomes an `EngineError`."""
        try:
            return worker.wait(job)
        except LoraGrpoError as error:
            error.add_note(f"the {worker.name} failed; {self._where()}")
            raise
        except Exception as error:
            failure = EngineError(f"the {worker.name} died: {type(error).__name__}: {error}")
            failure.add_note(self._where())
            raise failure from error

    def _where(self) -> str:
        return f"{counted(self._sync.head.step, 'step')} done, and HEAD is {self._sync.head}"


def lag_behind(store: AdapterStore, head: AdapterVersion, version: AdapterVersion, most: int) -> int | None:
    """How many versions were made after `version` on the way to `head`; None for more than `most`, or another way."""
    way = islice(ancestors(store, head.number), most + 1)
    return next((lag for lag, number in enumerate(way) if number == version.number), None)
