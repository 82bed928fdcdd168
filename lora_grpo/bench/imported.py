"""Importing this imports all that measuring on an engine needs: for a process that others are forked from."""

import gc
import importlib
import traceback

from lora_grpo.engines import compat
from lora_grpo.errors import LoraGrpoError

try:
    compat.import_vllm()
    for _name in ("vllm.entrypoints.llm", "lora_grpo.bench.suite"):
        importlib.import_module(_name)
except (ImportError, OSError, RuntimeError, AttributeError, LoraGrpoError):
    # The first of those that are forked says why.
    traceback.print_exc()
# Nobody has to look through all that again for garbage.
gc.freeze()
