"""TensorBoard, W&B and the others, through accelerate's tracker classes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
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


def started_trackers(names: Sequence[str], run_dir: Path, info: Mapping[str, Any]) -> list[Any]:
    """accelerate's trackers of these names, such as 'tensorboard' or 'wandb', in the main process alone."""
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether this is the main process
    settings = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in flat(info)}
    trackers = []
    for name in dict.fromkeys(names):
        kind = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": str(run_dir)} if kind.requires_logging_directory else {}
        tracker = kind(name if where else run_dir.name, **where)
        tracker.start()
        tracker.store_init_configuration(settings)
        trackers.append(tracker)
    return trackers


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
