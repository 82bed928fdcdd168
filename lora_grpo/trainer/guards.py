"""Automatic rollback: small policies that look at the steps so far and may give a reason to go back."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lora_grpo.adapters.version import Target, parse_target
from lora_grpo.config import GuardConfig
from lora_grpo.errors import ConfigError, TrainingError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.render import GAP

Steps = Sequence[Mapping[str, Any]]  # each step's metrics in order, those that a rollback undid left out


class Policy(Protocol):
    def why(self, steps: Steps, error: TrainingError | None) -> str | None:
        """A sentence, or None. `error` is what ended the step, which then has no metrics in `steps`."""

    def check(self, config: GRPOConfig) -> None:
        """Raise `ConfigError` when runs with `config` do not measure what this looks at."""
        return


@dataclass(frozen=True, slots=True)
class NonFinite(Policy):
    """A loss, gradient or adapter weight that is not finite.

    >>> NonFinite().why([], TrainingError("the loss is nan"))
    'the loss is nan'
    """

    def why(self, steps: Steps, error: TrainingError | None) -> str | None:
        return None if error is None else str(error)


@dataclass(frozen=True, slots=True)
class RewardCollapse(Policy):
    """In each of the last `patience` steps, `metric` was at least `drop` below its mean over the `window` steps before.

    >>> RewardCollapse(drop=0.3, window=2, patience=1).why([{"reward": 0.8}, {"reward": 0.8}, {"reward": 0.1}], None)
    'reward fell to 0.1, 0.3 or more below its mean of 0.8 in the steps before'
    """

    drop: float
    window: int = 10
    patience: int = 2
    metric: str = "reward"

    def __post_init__(self) -> None:
        _require("RewardCollapse.drop", self.drop, self.drop > 0, "above 0, in units of the reward")
        _require("RewardCollapse.window", self.window, self.window >= 1, "at least 1 step")
        _require("RewardCollapse.patience", self.patience, self.patience >= 1, "at least 1 step")

    def why(self, steps: Steps, error: TrainingError | None) -> str | None:
        if error is not None or len(steps) < self.window + self.patience:
            return None
        *before, last = steps[-self.window - self.patience :]
        if any(self.metric not in metrics for metrics in before):
            return None  # the run was begun with other rewards
        values = [float(metrics[self.metric]) for metrics in (*before, last)]
        mean, latest = statistics.fmean(values[: self.window]), values[self.window :]
        if not all(value <= mean - self.drop for value in latest):
            return None
        shown = ", ".join(f"{value:.4g}" for value in latest)
        return f"{self.metric} fell to {shown}, {self.drop:g} or more below its mean of {mean:.4g} in the steps before"


@dataclass(frozen=True, slots=True)
class _Limit(Policy):
    limit: float
    metric: ClassVar[str]
    words: ClassVar[str]

    def __post_init__(self) -> None:
        _require(f"{type(self).__name__}.limit", self.limit, self.limit > 0, "above 0 nats")

    def why(self, steps: Steps, error: TrainingError | None) -> str | None:
        value = None if error is not None or not steps else steps[-1].get(self.metric)
        if value is None or not value > self.limit:
            return None
        return f"{self.words} is {value:.4g} nats per token, above {self.limit:g}"


class LogprobGap(_Limit):
    """The mean |trainer - sampler| difference of log-probs in a step is above `limit`, nats per token.

    >>> LogprobGap(limit=0.05).why([{"sampling/sampling_logp_difference/mean": 0.2}], None)
    'the trainer/sampler log-prob gap is 0.2 nats per token, above 0.05'
    """

    metric, words = GAP, "the trainer/sampler log-prob gap"


class ReferenceKL(_Limit):
    """The mean KL to the reference in a step is above `limit`, nats per token; it needs `beta` above 0.

    >>> ReferenceKL(limit=0.5).why([{"kl": 0.7}], None)
    'the KL to the reference is 0.7 nats per token, above 0.5'
    """

    metric, words = "kl", "the KL to the reference"

    def check(self, config: GRPOConfig) -> None:
        if not config.beta:
            raise ConfigError("a guard on the KL to the reference needs beta > 0: with beta=0 it is never computed")


@dataclass(init=False)
class Guard:
    """If any policy has a reason, the run goes back to version `to`, at most `max_rollbacks` times.

    >>> guard = Guard(NonFinite(), RewardCollapse(drop=0.3), learning_rate_factor=0.5)

    `to` is a number, "parent", "best" or "best:METRIC". Each time, the learning rate is multiplied by
    `learning_rate_factor`, and stays so whatever version is restored. The count survives a resume.
    """

    policies: tuple[Policy, ...]
    to: Target
    max_rollbacks: int
    learning_rate_factor: float

    def __init__(
        self, *policies: Policy, to: Target = "best:reward", max_rollbacks: int = 3, learning_rate_factor: float = 1.0
    ) -> None:
        if not policies:
            raise ConfigError("a Guard needs at least one policy, such as NonFinite()")
        parse_target(to)
        _require("Guard.max_rollbacks", max_rollbacks, max_rollbacks >= 1, "at least 1")
        _require("Guard.learning_rate_factor", learning_rate_factor, 0 < learning_rate_factor <= 1, "in (0, 1]")
        self.policies, self.to = policies, to
        self.max_rollbacks, self.learning_rate_factor = max_rollbacks, learning_rate_factor

    def check(self, config: GRPOConfig) -> None:
        """Raises `ConfigError` for a policy that could never fire in a run with `config`."""
        for policy in self.policies:
            policy.check(config)

    def why(self, steps: Steps, error: TrainingError | None) -> str | None:
        """Every policy's reason, joined; None where there is none."""
        return "; ".join(filter(None, (policy.why(steps, error) for policy in self.policies))) or None


def build_guard(config: GuardConfig) -> Guard | None:
    policies: list[Policy] = [NonFinite()] if config.non_finite else []
    if config.reward_drop is not None:
        policies.append(RewardCollapse(config.reward_drop, config.reward_window, config.reward_patience))
    if config.logprob_gap is not None:
        policies.append(LogprobGap(config.logprob_gap))
    if config.kl is not None:
        policies.append(ReferenceKL(config.kl))
    limits = config.model_dump(include={"to", "max_rollbacks", "learning_rate_factor"})
    return Guard(*policies, **limits) if policies else None


def _require(name: str, value: float, holds: bool, needed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} must be {needed}")
