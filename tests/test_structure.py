"""The house: imports point down and in no circle, vLLM stays in its room, and the package's face is light and fixed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import lora_grpo
from lora_grpo import errors

ROOT = Path(lora_grpo.__file__).parent
FLOORS = [
    {"types", "errors", "user_cache", "hub"},
    {"kernels"},
    {"trl_names", "sections", "grpo_config", "config", "config_file", "data", "rewards", "metrics", "worker"},
    {"adapters"},
    {"remote"},
    {"grpo"},
    {"policy", "reference", "state"},
    {"engines"},
    {"sync", "rollback", "report"},
    {"trainer", "bench", "integrations"},
    {"demo"},
    {"cli", "__main__", "__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 50


def imported(path: Path) -> set[str]:
    """Every absolute module name that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("lora_grpo.")}
    if room == "__init__":
        return
    too_high = {other for other in rooms - {room} if FLOOR_OF[other] > FLOOR_OF[room]}
    assert not too_high, f"{room} imports from {too_high}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_vllm_stays_in_the_engine_room(path: Path) -> None:
    if room_of(path) != "engines":
        assert not {name for name in imported(path) if name.split(".")[0] == "vllm"}


def test_no_file_is_part_of_a_circle() -> None:
    """An import under `TYPE_CHECKING` or inside a function counts: the reader climbs back all the same."""
    modules = {module_of(path) for path in FILES}
    needs: dict[str, set[str]] = {}
    for path in FILES:
        named = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
        needs[module_of(path)] = (named & modules) - {module_of(path)}
    TopologicalSorter(needs).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {
        f"{path.relative_to(ROOT)}:{one.name}" for one in functions if (one.end_lineno or 0) - one.lineno >= MOST_LINES
    }
    assert not long


@pytest.mark.parametrize(
    "module",
    ["lora_grpo", "lora_grpo.cli", "lora_grpo.adapters.store", "lora_grpo.rewards", "lora_grpo.engines.server.launch"],
)
def test_imports_are_light(module: str) -> None:
    heavy = ("torch", "vllm", "datasets", "matplotlib", "trl")
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"


def test_what_every_process_of_vllm_imports_is_light() -> None:
    """The plugin is loaded in each, before it looks whether it is needed; PEFT alone would take seconds there."""
    heavy = ("peft", "transformers")
    code = f"import lora_grpo.engines.packing, sys; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_what_scripts_import_from_here_is_there(folder: str) -> None:
    """Types are checked in the package alone, and some scripts run once in a long while."""
    missing = []
    for path in sorted((ROOT.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_grpo":
                home = importlib.import_module(node.module or "")
                for name in (alias.name for alias in node.names):
                    is_module = hasattr(home, "__path__") and find_spec(f"{node.module}.{name}")
                    missing += [] if is_module or hasattr(home, name) else [f"{path.name}: {node.module}.{name}"]
    assert not missing


def test_every_public_name_resolves() -> None:
    assert sorted(lora_grpo.__all__) == lora_grpo.__all__ == sorted(lora_grpo._HOMES)
    for name in lora_grpo.__all__:
        assert getattr(lora_grpo, name).__name__ == name
    assert {error for error in vars(errors) if error[0].isupper()} <= set(lora_grpo.__all__)
    with pytest.raises(AttributeError, match="Mergeur"):
        _ = lora_grpo.Mergeur
