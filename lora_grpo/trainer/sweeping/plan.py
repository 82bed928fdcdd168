"""What a sweep is to do, as `SWEEP/sweep.json` keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files import disk
from lora_grpo.config import RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config, setting, with_settings
from lora_grpo.errors import ConfigError
from lora_grpo.trainer.sweeping.grid import Trial

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepPlan:
    """`settings` are a run's, whose `output_dir` is the sweep's directory; each trial is a run in a folder of it.

    At each of `rungs` (steps), the best `keep` of the members that came to it go on. Every `evolve_every` steps, the
    worst `share` of the members take over from the best `share` and have the numbers in `perturb` changed. `at_once`
    members run at the same time (None: as many as fit). `seed` decides on draws.
    """

    settings: RunConfig
    trials: Sequence[Trial]
    rungs: tuple[int, ...] = ()
    keep: float = 0.5
    evolve_every: int | None = None
    perturb: tuple[str, ...] = ()
    share: float = 0.25
    at_once: int | None = None
    seed: int = 0
    directory: Path = field(init=False)

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what cannot be run, before anything is written or started."""
        object.__setattr__(self, "directory", Path(self.settings.output_dir))
        configs = [self.config(trial) for trial in self.trials]
        for trial, config in zip(self.trials, configs, strict=True):
            for section in ("model", "engine"):
                if getattr(config, section) != getattr(self.settings, section):
                    raise ConfigError(f"{' '.join(trial.settings)}: members share one {section}; sweep other settings")
        shortest = min(config.grpo.total_steps for config in configs)
        for rung in self.rungs:
            if not 1 <= rung < shortest:
                raise ConfigError(
                    f"a rung at step {rung} must lie between 1 and {shortest - 1}, below grpo.total_steps"
                )
        if not 0 < self.keep < 1 or not 0 < self.share <= 0.5:
            raise ConfigError(f"keep={self.keep} must be between 0 and 1, share={self.share} at most 0.5")
        if self.evolve_every is not None:
            self._check_evolution(configs, self.evolve_every)
        elif self.perturb:
            raise ConfigError(
                f"--perturb {' '.join(self.perturb)} works only with take-overs; give --evolve-every STEPS too"
            )

    def _check_evolution(self, configs: Sequence[RunConfig], every: int) -> None:
        if every < 1 or len(configs) < 2 or self.rungs:
            raise ConfigError("population-based training needs two members, a step between take-overs, and no rungs")
        if self.at_once is not None and self.at_once < len(configs):
            raise ConfigError(
                f"--at-once {self.at_once}: population-based training compares all {len(configs)} at once"
            )
        if len({config.lora.model_dump_json() for config in configs}) > 1:
            raise ConfigError("members that take over each other's adapters need the same lora settings")
        for key in self.perturb:
            value = setting(configs[0], key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"--perturb {key}: it is {value!r}, and only numbers can be perturbed")

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
        for name in (SWEEP_FILE, RESOLVED_FILE):
            if (self.directory / name).exists():
                kind = "sweep" if name == SWEEP_FILE else "run"
                raise ConfigError(f"{self.directory} holds a {kind} already; --resume it, or name another output_dir")
        values = {name: value for name, value in asdict(self).items() if name not in ("settings", "directory")}
        values["settings"] = self.settings.model_dump(mode="json")
        self.directory.mkdir(parents=True, exist_ok=True)
        with disk.reported(f"writing {self.directory / SWEEP_FILE}"):
            disk.replace_file(self.directory / SWEEP_FILE, json.dumps(values, indent=1).encode(), sync=True)

    @classmethod
    def read(cls, directory: Path) -> SweepPlan:
        """What `write` wrote, wherever the directory lies by now. Raises `ConfigError`."""
        content = disk.read_small(directory / SWEEP_FILE)
        if content is None:
            raise ConfigError(f"{directory} has no {SWEEP_FILE}: it is not a sweep; begin one with a TOML file")
        try:
            values: dict[str, Any] = disk.parse_json(content)
            settings = RunConfig(**{**values.pop("settings"), "output_dir": str(directory)})
            trials = [Trial(trial["name"], tuple(trial["settings"])) for trial in values.pop("trials")]
            values |= {name: tuple(values[name]) for name in ("rungs", "perturb")}
            return cls(settings, trials, **values)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{directory / SWEEP_FILE} is damaged: {error}") from error
