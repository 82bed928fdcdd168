"""Groups of settings: small frozen models, checked once when built; an unknown key is refused with the nearest name."""

import difflib
import json
import types
import typing
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from lora_grpo.errors import ConfigError
from lora_grpo.trl_names import TRL_SETTINGS


class Section(BaseModel):
    """A frozen group of settings; building one with a bad value raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = _problems(type(self), error, values)
            failure = ConfigError("; ".join(f"{path}: {text}" if path else text for path, text in problems))
            failure.problems = problems  # type: ignore[attr-defined]  # for a section around this one
            raise failure from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(f"{name}: settings cannot be changed; make new ones with replace({name}={value!r})")

    def replace(self, **changes: Any) -> Any:
        """A copy with `changes`, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})


def nearest_key(key: str, known: Collection[str]) -> str:
    """What to say of an unknown key: what to do instead if it is TRL's, the nearest known one, or all of them."""
    if key in TRL_SETTINGS:
        return TRL_SETTINGS[key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"


def nearest_setting(key: str, section: type[BaseModel]) -> str:
    """The same of a section's keys, and of those of the sections in it."""
    for name, field in section.model_fields.items():
        inner, repeated = section_of(field.annotation)
        if inner is not None and key in inner.model_fields:
            return f"did you mean '{name}.{'0.' if repeated else ''}{key}'?"
    return nearest_key(key, section.model_fields)


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if it holds one, and whether it holds a list of them."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part, part is not annotation
    return None, False


def type_name(annotation: Any) -> str:
    """The type as a writer of TOML thinks of it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(json.dumps(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(part) for part in parts if part is not type(None))
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    if origin is dict:
        return "table" if parts[1] is Any else f"table of {type_name(parts[1])}"
    return {str: "text", bool: "true | false", int: "integer", float: "number"}.get(annotation, str(annotation))


def _problems(section: type[BaseModel], error: ValidationError, given: dict[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for problem in error.errors():
        inner = getattr(problem.get("ctx", {}).get("error"), "problems", None)
        where = ".".join(map(str, problem["loc"] if inner else problem["loc"][:1]))
        if inner is not None:
            found += [(f"{where}.{path}" if path else where, text) for path, text in inner]
        elif not any(f"{path}.".startswith(f"{where}.") for path, _ in found):
            # Pydantic tells of each type of a union, and calls a list too short when it holds a bad item.
            found.append((where, _sentence(section, problem, given)))
    return found


def _sentence(section: type[BaseModel], problem: Any, given: dict[str, Any]) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"unknown key; {nearest_setting(key, section)}"
    field = section.model_fields[key]
    if problem["type"] == "missing":
        return f"needed, but not there ({field.description})"
    finite = ", finite" if problem["type"] == "finite_number" else ""
    return f"must be {_wanted(key, field)}{finite} (got {given[key]!r:.200})"


def _wanted(key: str, field: FieldInfo) -> str:
    inner, repeated = section_of(field.annotation)
    name = type_name(field.annotation) if inner is None else f"[[{key}]] tables" if repeated else f"a [{key}] table"
    article = {"integer": "an ", "number": "a ", "list": "a ", "table": "a "}.get(name.split()[0], "")
    bounds = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "{} or more"}
    limits = [(getattr(limit, bound, None), words) for limit in field.metadata for bound, words in bounds.items()]
    return ", ".join([article + name, *(words.format(value) for value, words in limits if value is not None)])
