"""Run settings in files: TOML to read, JSON for the resolved ones that a run keeps."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lora_grpo.config import RunConfig
from lora_grpo.errors import ConfigError
from lora_grpo.sections import nearest_setting, section_of, type_name

RESOLVED_FILE = "config.json"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a TOML file, or of a run, with `overrides` such as 'grpo.beta=0.04' applied.

    A run is its directory or the `config.json` there; `output_dir` is then that directory, wherever it lies. An
    override's value is TOML (1e-4, true, ["q_proj", "v_proj"]), or bare text; an empty one, or null, takes the key
    out, back to its default. `rewards.0.weight=2` reaches into a list. Raises `ConfigError` naming file and key."""
    path = Path(path)
    run = path.parent if path.name == RESOLVED_FILE and (path.parent / "store.json").exists() else path
    return _built(str(path), _of_run(run) if run.is_dir() else read_settings(path), overrides)


def with_settings(config: RunConfig, overrides: Sequence[str], label: str) -> RunConfig:
    """`config` with `overrides` as `load_config` takes them; `label` is what an error calls it."""
    return _built(label, config.model_dump(mode="json"), overrides)


def setting(config: RunConfig, key: str) -> Any:
    """The value of "grpo.learning_rate" or "rewards.0.weight". Raises `ConfigError` for a key that is none."""
    _check_path(key.split("."), key)
    value: Any = config.model_dump()
    for part in key.split("."):
        value = value[_index(list(value), part, key)] if isinstance(value, list | tuple) else value[part]
    return value


def names_a_model(target: str) -> bool:
    """Whether `target` is a base model's directory or hub name, rather than a config file or a run."""
    path = Path(target)
    if told_as_sweep(path):
        return False
    if path.is_dir():
        return not (path / RESOLVED_FILE).is_file() or "output_dir" not in read_settings(path / RESOLVED_FILE)
    return not path.exists() and path.suffix not in (".toml", ".json")


def told_as_sweep(directory: Path) -> str:
    """What to say of a directory that holds a sweep where a run is asked for; "" for any other."""
    if not (directory / "sweep.json").is_file():
        return ""
    members = sorted(place.parent for place in directory.glob("*/store.json"))
    such = f", such as {members[0]}" if members else ""
    others = f"`lora-grpo sweep {directory} --resume` goes on with all of them"
    return f"{directory} is a sweep, not a run: name the directory of one of its members{such}; {others}"


def config_of_model(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The default settings for a base model, with `overrides`; what they say of data, rewards and the run is void."""
    void: dict[str, Any] = {"output_dir": "-", "data": {"train": "-"}, "rewards": [{"name": "-"}]}
    return _built(name, {**void, "model": {"name": name}}, overrides)


def _built(label: str, values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        apply_override(values, override)
    try:
        return RunConfig(**values)
    except ConfigError as error:
        given = f" with {' '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{label}{given}: {error}") from error


def save_config(config: RunConfig, run_dir: str | Path) -> Path:
    """Writes every setting, defaults included, to `RUN/config.json`, which `load_config` reads back equal."""
    path = Path(run_dir) / RESOLVED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    staged.write_text(text, encoding="utf-8", errors="backslashreplace")
    return staged.replace(path)


class Setting(NamedTuple):
    key: str
    type: str
    default: str
    description: str


def describe_settings(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Every key with its type, default and meaning, section by section."""
    for name, field in section.model_fields.items():
        inner, repeated = section_of(field.annotation)
        if inner is not None:
            yield from describe_settings(inner, f"{prefix}{name}.{'N.' if repeated else ''}")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "(needed)" if default is PydanticUndefined else "-" if default is None else json.dumps(default)
        yield Setting(f"{prefix}{name}", type_name(field.annotation), shown, field.description or "")


def _of_run(run: Path) -> dict[str, Any]:
    if not (run / RESOLVED_FILE).is_file():
        not_yet = f"{run} has no {RESOLVED_FILE}: it is no run, or stopped before its first version; name its TOML file"
        raise ConfigError(told_as_sweep(run) or not_yet)
    if names_a_model(str(run)):
        raise ConfigError(f"{run} is a model, not a run; lora-grpo init {run} --data FILE writes a config file for it")
    return {**read_settings(run / RESOLVED_FILE), "output_dir": str(run)}


def read_settings(path: Path) -> dict[str, Any]:
    """What a TOML or JSON file holds. Raises `ConfigError` where it is none, or none of settings."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError(f"there is no config file or run {path}{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one table of settings, not a {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one 'section.key=value' in the settings of a file. Raises `ConfigError` for what is no such thing."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    _check_path(parts, override)
    *path, last = parts
    target: Any = values
    for part, inner in zip(path, parts[1:], strict=True):
        made: Any = [] if inner.isdigit() else {}
        target = target[_index(target, part, override)] if isinstance(target, list) else target.setdefault(part, made)
        if not isinstance(target, list | dict):
            raise ConfigError(f"override {override!r}: {part!r} is {target!r}, which has no keys")
    value = _value(text.strip(), override)
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif value is None:
        target.pop(last, None)
    else:
        target[last] = value


def _check_path(parts: list[str], override: str) -> None:
    section: type[BaseModel] | None = RunConfig
    for part in parts:
        if section is None or part.isdigit():
            continue
        if part not in section.model_fields:
            raise ConfigError(f"override {override!r}: unknown key {part!r}; {nearest_setting(part, section)}")
        section, _ = section_of(section.model_fields[part].annotation)


def _index(target: list[Any], part: str, override: str) -> int:
    """Of an entry that is there, or of a new one at the end."""
    if not part.isdigit() or int(part) > len(target):
        known = f"a list of {len(target)}: indexes count from 0, and {len(target)} adds one"
        raise ConfigError(f"override {override!r}: {part!r} is not an index of {known}")
    if int(part) == len(target):
        target.append({})
    return int(part)


def _value(text: str, override: str) -> Any:
    """A TOML value, else the text itself; None for an empty one, and for JSON's null, which TOML has not got."""
    if text in ("", "null"):
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[0] in "[{\"'":
            fix = """text needs quotes, and the whole too, for the shell: 'key=["a", "b"]'"""
            raise ConfigError(f"override {override!r} is not valid TOML ({error}); {fix}") from error
        return text
    return parsed["value"] if len(parsed) == 1 else text
