"""TensorBoard, W&B and the others, through accelerate's tracker classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_grpo.errors import ConfigError


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for an unknown name, or one that is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, list(LOGGER_TYPE_TO_CLASS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}"
            raise ConfigError(f"report_to: unknown tracker {name!r}; {hint}")
        if name not in installed:
            raise ConfigError(f"report_to: {name!r} is not installed; pip install {name}, or leave it out")


class Trackers:
    """Started trackers; `names` as accelerate calls them, such as 'tensorboard' or 'wandb'.

    Only the main process may build this. Raises `ConfigError` for an unknown name, or one that is not installed.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, info: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        check_trackers(names)
        PartialState()  # accelerate's trackers ask it whether this is the main process
        self._trackers = []
        for name in dict.fromkeys(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            where = {"logging_dir": str(run_dir)} if kind.requires_logging_directory else {}
            run_name = name if where else run_dir.name
            tracker = kind(run_name, **where)
            tracker.start()
            tracker.store_init_configuration(_flat(info))
            self._trackers.append(tracker)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as dotted names with values that every tracker takes."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
