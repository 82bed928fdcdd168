"""What a sweep tries, a grid or draws, and does, as `SWEEP/sweep.json` keeps it; how it selects among members."""

import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field, model_validator

from lora_grpo.adapters.files import disk
from lora_grpo.config import RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config, setting, with_settings
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import Record
from lora_grpo.sections import Section

_NUMBER = r"([-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
_RANGE = re.compile(rf"(log:)?{_NUMBER}\.\.{_NUMBER}")
MAX_TRIALS = 1000  # more is a typing error rather than a sweep
SWEEP_FILE = "sweep.json"
WINDOW = 3  # steps whose mean reward is a score
FACTORS = (0.8, 1.25)  # of a setting, in population-based training (Jaderberg et al., 2017, arXiv 1711.09846)


@dataclass(frozen=True, slots=True)
class Trial:
    name: str
    settings: tuple[str, ...]  # its overrides, such as "grpo.learning_rate=3e-5"


Choice: TypeAlias = list[str] | Callable[[random.Random], str]  # what a setting may be: these, or what is drawn


def trials_of(swept: Sequence[str], *, sample: int | None = None, seed: int = 0) -> list[Trial]:
    """The trials of "key=1e-5,3e-5" and "key=0,1": every combination, or `sample` draws, the same for each `seed`.
    Draws may also come from a range: "key=0.1..0.9", evenly, or "key=log:1e-6..1e-4", evenly in its logarithm; of whole
    numbers where both ends are. Commas within brackets and quotes separate nothing. Raises `ConfigError`."""
    choices = dict(map(_choice, swept))
    if not choices:
        raise ConfigError("a sweep needs a setting with several values, such as grpo.learning_rate=1e-5,3e-5,1e-4")
    if len(choices) < len(swept):
        raise ConfigError(f"{' '.join(swept)} names a setting twice; give all its values at once")
    if sample is None:
        listed = {key: choice for key, choice in choices.items() if isinstance(choice, list)}
        if span := next((key for key in choices if key not in listed), None):
            raise ConfigError(f"{span} has a range, but a grid needs single values; add --sample N to draw from it")
        combinations = list(itertools.product(*listed.values()))
    else:
        combinations = _different(choices, min(sample, MAX_TRIALS + 1), random.Random(seed))
    if len(combinations) > MAX_TRIALS:
        raise ConfigError(f"{len(combinations)} members are more than {MAX_TRIALS}; give fewer values, or --sample N")
    width = len(str(len(combinations) - 1))
    return [_trial(f"{number:0{width}d}", tuple(choices), values) for number, values in enumerate(combinations)]


def is_swept(text: str) -> bool:
    """Whether "key=..." names several values or a range, rather than one value for all."""
    values = text.partition("=")[2]
    return _RANGE.fullmatch(values) is not None or len(_split(values)) > 1


def _choice(text: str) -> tuple[str, Choice]:
    key, equals, values = text.partition("=")
    if not (equals and key and values):
        raise ConfigError(f"{text!r} is not of the form section.key=value,value")
    span = _RANGE.fullmatch(values)
    if span is not None:
        return key, _range(text, *span.groups())
    listed = _split(values)
    if not all(map(str.strip, listed)) or len(set(listed)) < len(listed):
        raise ConfigError(f"{text!r}: leave out a value that is empty, or there twice; each makes a member")
    return key, listed


def _range(text: str, log: str | None, low: str, high: str) -> Callable[[random.Random], str]:
    least, most, whole = float(low), float(high), low.isdigit() and high.isdigit()
    if not (math.isfinite(most - least) and least < most and (least > 0 or not log)):
        raise ConfigError(f"{text!r}: the second number of a range must be larger; with log: both must be above 0")

    def draw(random_: random.Random) -> str:
        value = math.exp(random_.uniform(math.log(least), math.log(most))) if log else random_.uniform(least, most)
        return str(round(value)) if whole else f"{value:.4g}"

    return draw


def _split(values: str) -> list[str]:
    """At commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in values:
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _different(choices: dict[str, Choice], sample: int, draw: random.Random) -> list[tuple[str, ...]]:
    found: dict[tuple[str, ...], None] = {}
    for _ in range(100 * sample):
        if len(found) < sample:
            drawn = (draw.choice(one) if isinstance(one, list) else one(draw) for one in choices.values())
            found[tuple(drawn)] = None
    if len(found) < sample:
        raise ConfigError(f"--sample {sample}: only {len(found)} different members were found; sample fewer")
    return list(found)


def _trial(number: str, keys: tuple[str, ...], values: tuple[str, ...]) -> Trial:
    # A value as a directory's name can hold it.
    plain = [re.sub(r"[^\w.+-]+", "-", json.dumps(value)[1:-1]).strip("-") for value in values]
    label = "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, plain, strict=True))
    return Trial(f"{number}_{label}"[:80], tuple(map("=".join, zip(keys, values, strict=True))))


class SweepPlan(Section):
    """`settings` are a run's, whose `output_dir` is the sweep's directory; each trial is a run in a folder of it. At
    each of `rungs` (steps), the best `keep` of the members that came to it go on. Every `evolve_every` steps, the worst
    quarter take over from the best and have the numbers in `perturb` changed. `at_once` members run at the same time
    (None: as many as fit). `seed` decides on draws."""

    settings: RunConfig
    trials: tuple[Trial, ...] = Field(min_length=1)
    rungs: tuple[int, ...] = ()
    keep: float = Field(0.5, gt=0, lt=1)
    evolve_every: int | None = Field(None, ge=1)
    perturb: tuple[str, ...] = ()
    at_once: int | None = None
    seed: int = 0

    @property
    def directory(self) -> Path:
        return Path(self.settings.output_dir)

    def comparable(self, records: Sequence[Record]) -> Sequence[Record]:
        """By the rewards' weights of `settings` where members have their own: a larger weight is no better policy."""
        differ = any(re.fullmatch(r"rewards\.\d+\.weight", key) for key in {*self._swept(), *self.perturb})
        weights = [reward.weight for reward in self.settings.rewards]
        return [weighed(record, weights) for record in records] if differ else records

    def _swept(self) -> set[str]:
        return {text.partition("=")[0].strip() for trial in self.trials for text in trial.settings}

    @model_validator(mode="after")
    def _check(self) -> "SweepPlan":
        for key in self._swept():
            if key in ("output_dir", "store_root"):
                raise ConfigError(f"{key}: each member gets a place of its own; sweep other settings")
            if (section := key.partition(".")[0]) in ("model", "engine"):
                raise ConfigError(f"{key}: members share one {section}; sweep other settings")
        configs = [self.config(trial) for trial in self.trials]
        last = min(config.grpo.total_steps for config in configs) - 1
        if wrong := [rung for rung in self.rungs if not 1 <= rung <= last]:
            raise ConfigError(f"a rung at step {wrong[0]} must be from 1 to {last}, below grpo.total_steps")
        if self.keep != type(self).model_fields["keep"].default and not self.rungs:
            raise ConfigError(f"--keep {self.keep:g} is the share that goes on at rungs; give --rungs STEPS too")
        if self.perturb and self.evolve_every is None:
            raise ConfigError(f"--perturb {' '.join(self.perturb)} is for take-overs; give --evolve-every STEPS too")
        if self.evolve_every is None:
            return self
        if len(configs) < 2 or self.rungs:
            raise ConfigError("population-based training needs two members, and no rungs")
        if self.at_once is not None and self.at_once < len(configs):
            raise ConfigError(f"--at-once {self.at_once}: a take-over compares all {len(configs)} at once")
        if len({config.lora.model_dump_json() for config in configs}) > 1:
            raise ConfigError("members that take over each other's adapters need the same lora settings")
        for key in self.perturb:
            value = setting(configs[0], key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"--perturb {key}: it is {value!r}, and only numbers can be perturbed")
        return self

    def config(self, trial: Trial) -> RunConfig:
        """A member's settings: its run's own, once it has begun, for a take-over may have changed them."""
        run = self.directory / trial.name
        if (run / RESOLVED_FILE).is_file():
            return load_config(run)
        root = self.settings.store_root
        place = [f"output_dir={run}", *([] if root is None else [f"store_root={root}/{trial.name}"])]
        return with_settings(self.settings, [*trial.settings, *place], f"member {trial.name}")

    def write(self) -> None:
        """Raises `ConfigError` where the directory holds a sweep, or a run, already."""
        for name, kind in ((SWEEP_FILE, "sweep"), (RESOLVED_FILE, "run")):
            if (self.directory / name).exists():
                raise ConfigError(f"{self.directory} holds a {kind} already; --resume it, or name another output_dir")
        self.directory.mkdir(parents=True, exist_ok=True)
        with disk.reported(f"writing {self.directory / SWEEP_FILE}"):
            disk.replace_file(self.directory / SWEEP_FILE, self.model_dump_json(indent=1).encode(), sync=True)

    @classmethod
    def read(cls, directory: Path) -> "SweepPlan":
        """What `write` wrote, wherever the directory lies by now. Raises `ConfigError` or `StoreCorrupt`."""

        def moved(values: Any) -> "SweepPlan":
            return cls(**{**values, "settings": {**values["settings"], "output_dir": str(directory)}})

        plan = disk.read_record(directory / SWEEP_FILE, moved)
        if plan is None:
            raise ConfigError(f"{directory} has no {SWEEP_FILE}: it is not a sweep; begin one with a TOML file")
        return plan


# Selection among members.


def score(history: Sequence[Record], step: int) -> float | None:
    """Mean reward of the last `WINDOW` steps up to `step`: None before it is there, -infinity if it is not finite."""
    if not history or history[-1]["step"] < step:
        return None
    rewards = [float(metrics["reward"]) for metrics in history if metrics["step"] <= step][-WINDOW:]
    mean = statistics.fmean(rewards) if rewards else math.nan
    return mean if math.isfinite(mean) else -math.inf


def weighed(metrics: Mapping[str, Any], weights: Sequence[float]) -> Record:
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
    return set(sorted(scores, key=lambda name: -scores[name])[count:])


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
