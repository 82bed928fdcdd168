"""GRPO for LoRA adapters on vLLM, without ever merging.

Names resolve when they are first used: importing the package loads neither torch nor vllm. `__init__.pyi` lists them.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_LIST = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8")).body
_HOMES = {alias.name: str(node.module) for node in _LIST if isinstance(node, ast.ImportFrom) for alias in node.names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
