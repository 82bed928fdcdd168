"""Groups of settings: small frozen models, checked once when built; an unknown key is refused with the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_grpo.errors import ConfigError
from lora_grpo.trl_names import TRL_SETTINGS


class Section(BaseModel):
    """A frozen group of settings; building one with a bad value raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _failure(_problems(type(self), error)) from None

    def replace(self, **changes: Any) -> Any:
        """A copy with `changes`, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})


def _failure(problems: list[tuple[str, str]]) -> ConfigError:
    """The error that says what is wrong with each (path of keys), kept apart for a section around this one."""
    failure = ConfigError("; ".join(f"{path}: {text}" if path else text for path, text in problems))
    failure.problems = problems  # type: ignore[attr-defined]
    return failure


def nearest_key(key: str, known: Collection[str]) -> str:
    """What to say of an unknown key: what to do instead if it is TRL's, the nearest known one, or all of them."""
    if key in TRL_SETTINGS:
        return TRL_SETTINGS[key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"


def _problems(section: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        inner = getattr(problem.get("ctx", {}).get("error"), "problems", None)
        if inner is not None:
            found += [(f"{where}.{path}" if path else where, text) for path, text in inner]
        elif not any(path.startswith(f"{where}.") for path, _ in found):
            # Pydantic also calls a list too short when it holds a bad item.
            found.append((where, _sentence(section, problem)))
    return found


def _sentence(section: type[BaseModel], problem: Any) -> str:
    """What is wrong with one key, the value it has, and for an unknown key the nearest name."""
    if problem["type"] == "extra_forbidden":
        return f"unknown key; {nearest_key(str(problem['loc'][-1]), section.model_fields)}"
    if problem["type"] == "missing":
        described = section.model_fields[str(problem["loc"][-1])].description
        return f"needed, but not there ({described})" if described else "needed, but not there"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if problem["type"] == "value_error" else f"{message} (got {problem['input']!r})"
