"""The reference page: every public name with its signature and docstring, every setting, every command.

`python -m tests.reference_page` (or `make reference`) writes it. Read from the source text, so that it is the same
everywhere and nothing heavy is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lora_grpo
from lora_grpo.cli import COMMANDS
from lora_grpo.config_file import describe_settings

PACKAGE = Path(lora_grpo.__file__).parent
PAGE = Path(__file__).parent.parent / "examples" / "docs" / "reference.md"
HEAD = """# Reference

Written by `make reference` from docstrings and settings. Letters for shapes: P prompts, G completions of a prompt,
B = P*G rows, T tokens, V vocabulary. Of types, `Sequences` are rows of token ids,
`LogProbs` rows of nats, `Files` buffers by file name. Names import from `lora_grpo`; for errors see
[troubleshooting](troubleshooting.md).
"""


def page() -> str:
    return "\n".join([HEAD, *_names(), *_settings(), *_commands()]) + "\n"


def _names() -> Iterator[str]:
    for name in lora_grpo.__all__:
        if name.startswith("__"):
            continue
        node, module = definition(lora_grpo._HOMES[name], name)
        yield f"## {name}\n"
        if isinstance(node, ast.ClassDef):
            yield from _class(node, module)
        else:
            yield from _function(node, name)


def definition(module: str, name: str) -> tuple[ast.ClassDef | ast.FunctionDef, str]:
    """The definition of `name`, and the module that has it: `module`, or one that it imports it from."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    tree = ast.parse((base / "__init__.py" if base.is_dir() else base.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            assert node.module is not None
            return definition(node.module, name)
    raise LookupError(f"{module} defines no {name}")


def _class(node: ast.ClassDef, module: str) -> Iterator[str]:
    yield from _doc(node)
    if _is_section(node):
        yield "Its fields are settings, below.\n"
        return
    if fields := [child for child in node.body if isinstance(child, ast.AnnAssign)]:
        yield "```python"
        # With double quotes, as ruff would have the page.
        yield from (ast.unparse(field).replace("'", '"') for field in fields)
        yield "```\n"
    yield from _methods(node)
    for base in map(ast.unparse, node.bases):
        if base in ("StoreView", "Run"):
            inherited, _ = definition(module, base)
            assert isinstance(inherited, ast.ClassDef)
            inherited.body = [child for child in inherited.body if getattr(child, "name", "") != "__init__"]
            yield from _methods(inherited)


def _methods(node: ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef) or any(".setter" in ast.unparse(one) for one in child.decorator_list):
            continue
        if child.name == "__init__":
            yield from _function(child, node.name)
        elif not child.name.startswith("_"):
            yield from _function(child, f".{child.name}")


def _is_section(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "Section" for base in node.bases)


def _function(node: ast.FunctionDef, name: str) -> Iterator[str]:
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    is_property = any("property" in ast.unparse(one) for one in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None and name.startswith(".") else ""
    call = "" if is_property else f"({arguments})"
    yield f"```python\n{name}{call}{returns}\n```\n"
    yield from _doc(node)


def _doc(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield f"{text}\n"


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield "`grpo.beta` is `beta` under `[grpo]` in a TOML file, and a field of `GRPOConfig` in Python.\n"
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    for setting in describe_settings():
        cells = [f"`{setting.key}`", setting.type, setting.default, setting.description]
        yield f"| {' | '.join(cell.replace('|', 'or') for cell in cells)} |"


def _commands() -> Iterator[str]:
    yield "\n## Commands\n"
    yield "`lora-grpo COMMAND --help` lists options. Exit codes: 0 done, 1 a bug or damage that `verify` found, 2 an"
    yield "error that the sentence explains, 130 stopped by Ctrl-C.\n"
    for name, command in COMMANDS.items():
        text = " ".join((command.__doc__ or "").split("\n\n")[0].split())
        yield f"- `lora-grpo {name}`: {text}"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
