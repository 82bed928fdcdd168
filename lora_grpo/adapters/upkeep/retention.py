"""Which versions stay, as small objects joined with `|`; pins, `HEAD` and leases are the store's to respect."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError

if TYPE_CHECKING:
    from lora_grpo.config import KeepConfig

Place: TypeAlias = Literal["tmpfs", "archive", "state"]
Candidates: TypeAlias = Mapping[int, Mapping[str, Any]]  # what a rule may look at: metrics by number of version


@dataclass(frozen=True, slots=True)
class Rule:
    """`kept` gives those to keep, of candidates in ascending order of number; `metric` is what it ranks by, if any."""

    words: str
    kept: Callable[[Candidates], Sequence[int]]
    metric: str | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """Which versions stay: rules for tmpfs, the archive and trainer states. `|` joins two.

    Make them with `keep_latest`, `keep_best`, `keep_every`, `keep_archived` and `keep_trainer_state`. A place without
    rules keeps everything, so `Retention()` keeps all. Pinned and loaded versions and `HEAD` always stay.

    >>> Retention().words("archive")
    'everything'
    """

    tmpfs: tuple[Rule, ...] = ()
    archive: tuple[Rule, ...] = ()
    state: tuple[Rule, ...] = ()

    def __or__(self, other: "Retention") -> "Retention":
        return Retention(self.tmpfs + other.tmpfs, self.archive + other.archive, self.state + other.state)

    @property
    def ranked(self) -> set[str]:
        """The metrics that rules rank versions by."""
        return {rule.metric for rule in (*self.tmpfs, *self.archive, *self.state) if rule.metric is not None}

    def limits(self, place: Place) -> bool:
        """Whether anything is ever removed from `place`."""
        return bool(getattr(self, place))

    def kept(self, place: Place, candidates: Candidates) -> set[int]:
        """The numbers that stay in `place`."""
        rules: tuple[Rule, ...] = getattr(self, place)
        if not rules:
            return {*candidates}
        ordered = {number: candidates[number] for number in sorted(candidates)}
        return {number for rule in rules for number in rule.kept(ordered)}

    def words(self, place: Place) -> str:
        """What is kept in `place`, for people."""
        return ", ".join(rule.words for rule in getattr(self, place)) or "everything"


def is_score(value: object) -> bool:
    """Whether a recorded metric can be ranked: a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def keep_latest(n: int) -> Retention:
    """The `n` newest versions.

    >>> keep_latest(8).words("tmpfs")
    'the last 8'
    """
    n = _positive("keep_latest", n)
    return Retention(tmpfs=(Rule(f"the last {n}", lambda found: [*found][-n:]),))


def keep_best(metric: str, n: int = 1, mode: Literal["max", "min"] = "max") -> Retention:
    """The `n` versions with the best recorded `metric`; of equals the newer. Versions without it do not count.

    >>> (keep_latest(8) | keep_best("reward", 2)).words("tmpfs")
    "the last 8, the 2 with the highest 'reward'"
    """
    if mode not in ("max", "min"):
        raise ConfigError(f"keep_best mode={mode!r} must be 'max' or 'min'")
    n, sign = _positive("keep_best", n), 1 if mode == "max" else -1

    def best(found: Candidates) -> list[int]:
        scored = [number for number in found if is_score(found[number].get(metric))]
        return sorted(scored, key=lambda number: (sign * found[number][metric], number))[-n:]

    words = f"the {n} with the {'highest' if mode == 'max' else 'lowest'} {metric!r}"
    return Retention(tmpfs=(Rule(words, best, metric),))


def keep_every(k: int) -> Retention:
    """Versions whose number is a multiple of `k`.

    >>> keep_every(50).words("tmpfs")
    'every number that 50 divides'
    """
    k = _positive("keep_every", k)
    return Retention(tmpfs=(Rule(f"every number that {k} divides", lambda found: [n for n in found if n % k == 0]),))


def default_retention(*, archived: bool) -> Retention:
    """What a store keeps that was told nothing: what stays durably is not needed on tmpfs as well."""
    return keep_latest(8) if archived else keep_latest(64) | keep_best("reward") | keep_best("eval/reward")


def keep_archived(rules: Retention) -> Retention:
    """`rules` for the durable copies in the run directory, which stay after a version left tmpfs.

    >>> (keep_latest(8) | keep_archived(keep_latest(500))).words("archive")
    'the last 500'
    """
    return Retention(archive=_plain("keep_archived", rules))


def keep_trainer_state(rules: Retention) -> Retention:
    """`rules` for trainer states (weights in fp32, optimizer, random state), each several times an adapter's size.

    The archived adapter of a version whose state is kept stays with it: without one there is no going back there.

    >>> keep_trainer_state(keep_latest(2)).words("state")
    'the last 2'
    """
    return Retention(state=_plain("keep_trainer_state", rules))


def retention(keep: "KeepConfig") -> Retention:
    """What a run's settings keep; what a guard goes back to and what "best" names stay exact."""
    rules = keep_latest(keep.on_tmpfs)
    rules |= keep_trainer_state(keep_latest(keep.trainer_states) | keep_best("reward") | keep_best("eval/reward"))
    if keep.archived is not None:
        archived = keep_latest(keep.archived) | keep_best("reward", keep.archived) | keep_best("eval/reward", 3)
        rules |= keep_archived(archived)
    return rules


def keeps_state(keep: "KeepConfig") -> Callable[[AdapterVersion], bool]:
    """Which versions' trainer states are written at all."""
    return lambda version: version.step % keep.trainer_state_every == 0


def _plain(name: str, rules: Retention) -> tuple[Rule, ...]:
    if not rules.tmpfs or rules.archive or rules.state:
        raise ConfigError(f"{name}(...) takes plain rules such as keep_latest(2), joined with |")
    return rules.tmpfs


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name}({value}) must be at least 1")
    return value
