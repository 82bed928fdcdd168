"""Selection among members, as small functions: who is given up at a rung, who takes over from whom, and how."""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError
from lora_grpo.state import TrainerState, capture_state, named_weights, restore_state
from lora_grpo.trainer import loop
from lora_grpo.trainer.forking import taken_from
from lora_grpo.trainer.run import Run

WINDOW = 3  # steps whose mean reward is a score
FACTORS = (0.8, 1.25)  # of a setting, in population-based training (Jaderberg et al., 2017, arXiv 1711.09846)


def score(history: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """The mean training reward of the last `WINDOW` steps up to `step`; None for a member that is not there yet, and
    minus infinity for one whose reward is not finite."""
    if not history or history[-1]["step"] < step:
        return None
    rewards = [float(metrics["reward"]) for metrics in history if metrics["step"] <= step][-WINDOW:]
    mean = statistics.fmean(rewards) if rewards else math.nan
    return mean if math.isfinite(mean) else -math.inf


def weighed(metrics: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """A step's or an evaluation's metrics, `reward` being its reward functions' means by these weights."""
    means = [value for name, value in metrics.items() if name.startswith("rewards/") and not name.endswith("/std")]
    # A function that scored no row has no mean: NaN here, null in a log.
    pairs = zip(weights, means, strict=True)
    known = [weight * mean for weight, mean in pairs if mean is not None and not math.isnan(mean)]
    return {**metrics, "reward": sum(known) if known else math.nan}


def halving_losers(scores: Mapping[str, float], keep: float) -> set[str]:
    """Successive halving (Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943): all but the best `keep`.

    At least one is kept; of equals the earlier. Members that come to a rung later are compared with all that were
    there before them, as in its asynchronous form (https://arxiv.org/abs/1810.05934)."""
    count = max(1, math.ceil(len(scores) * keep - 1e-9))
    ranked = sorted(scores, key=lambda name: -scores[name])
    return set(ranked[count:])


def takeovers(scores: Mapping[str, float], share: float, draw: random.Random) -> list[tuple[str, str]]:
    """Pairs (loser, winner) of population-based training: each of the worst `share`, and of those whose score is minus
    infinity, takes over one of the best `share`, drawn; nobody where the best is no better."""
    count = min(len(scores) // 2, max(1, math.ceil(len(scores) * share - 1e-9)))
    ranked = sorted(scores, key=lambda name: -scores[name])
    winners = ranked[: max(1, count)]
    lost = [name for place, name in enumerate(ranked) if place >= len(ranked) - count or scores[name] == -math.inf]
    pairs = [(loser, draw.choice(winners)) for loser in lost]
    return [(loser, winner) for loser, winner in pairs if scores[winner] > scores[loser]]


def perturbed(value: Any, draw: random.Random) -> float | int:
    """A number times one of `FACTORS`, a whole one at least 1 apart."""
    factor = draw.choice(FACTORS)
    if isinstance(value, float):
        return value * factor
    return max(0, min(value - 1, math.floor(value * factor)) if factor < 1 else max(value + 1, round(value * factor)))


def take_over(loser: Run, winner: Run) -> AdapterVersion:
    """`loser` stands where `winner` stands: its weights, optimizer, schedule and step, as a new version of the loser.

    Its parent is the loser's own last one; the journal holds `from/run`, `from/version` and `from/digest`. Seeds, data
    position and random state stay the loser's. Both are between two steps. One that a kill cut short, after its version
    was there, is only completed. Raises `ConfigError`, before anything has changed, for an adapter of another form."""
    if loser is winner:
        raise ConfigError(f"{loser.run_dir} cannot take over from itself; give two runs")
    taken = winner.version
    if (loser.version.digest, loser.version.step) != (taken.digest, winner.steps_done):
        _publish_as(loser, winner)
    loser.take_up(winner.steps_done, without_signal=winner.without_signal)
    loser.store.record(loser.version, **taken_from(winner.run_dir, taken))
    return loser.version


def _publish_as(loser: Run, winner: Run) -> None:
    trainings = (loser.sync.training, winner.sync.training)
    ours, theirs = ([(name, ab.shape) for name, ab in named_weights(one.modules)] for one in trainings)
    if ours != theirs:
        told = f"{loser.run_dir} cannot take over from {winner.run_dir}: their adapters differ in rank or layers"
        raise ConfigError(f"{told}; give both runs the same lora settings")
    before, state = (capture_state(one, {}) for one in trainings)
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("rng/")}
    keep_state = loser.sync.keep_state
    try:
        restore_state(TrainerState(tensors, state.meta), loser.sync.training)
        # A resume has to find it, whatever states retention asks for.
        loser.sync.keep_state = lambda version: True
        loop.publish(loser, winner.steps_done)
    except BaseException:
        restore_state(before, loser.sync.training)
        raise
    finally:
        loser.sync.keep_state = keep_state
