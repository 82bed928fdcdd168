"""Importing this imports all that measuring on an engine needs: for a process that others are forked from."""

import gc
import importlib

from lora_grpo.engines import compat

# What fails here fails again in the first step, which says why.
compat.import_vllm()
for _name in ("vllm.entrypoints.llm", "lora_grpo.bench.suite"):
    importlib.import_module(_name)
# Nobody has to look through all that again for garbage.
gc.freeze()
