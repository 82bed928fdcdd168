"""Which parts are measured, and how: from options, or from a TOML file with `[all]` and a table a part."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_grpo.bench.settings import DEFAULT_REPEAT, DEFAULT_STRATEGIES, PARTS, Settings
from lora_grpo.bench.shapes import shape_config
from lora_grpo.bench.strategies import check_name
from lora_grpo.errors import ConfigError
from lora_grpo.sections import nearest_key


def plan_parts(part: str, scenario: Path | None, options: Mapping[str, Any]) -> dict[str, Settings]:
    """Settings by part, in order; `options` win over the file. Raises `ConfigError` for what cannot be."""
    if part != "all" and part not in PARTS:
        raise ConfigError(f"unknown part {part!r}; {nearest_key(part, (*PARTS, 'all'))}")
    tables = {} if scenario is None else read_scenario(scenario)
    named = [name for name in PARTS if name in tables] or list(PARTS)
    chosen = named if part == "all" else [part]
    return {name: _settings(name, {**tables.get("all", {}), **tables.get(name, {}), **options}) for name in chosen}


def read_scenario(path: Path) -> dict[str, Any]:
    """The tables of a scenario file."""
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"no scenario {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    for name in tables:
        if name != "all" and name not in PARTS:
            raise ConfigError(f"{path}: unknown table [{name}]; {nearest_key(name, (*PARTS, 'all'))}")
    return tables


def _settings(part: str, values: Mapping[str, Any]) -> Settings:
    given = {"strategies": DEFAULT_STRATEGIES[part], "repeat": DEFAULT_REPEAT[part], **values}
    settings = Settings(**given)
    _check_strategies(settings.strategies)
    if settings.model is None:
        shape_config(str(settings.shape))
    return settings


def _check_strategies(names: Sequence[str]) -> None:
    for name in names:
        check_name(name)
