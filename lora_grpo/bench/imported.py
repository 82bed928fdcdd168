"""Importing this imports all that measuring on an engine needs: for a process that others are forked from."""

import gc
import importlib

from lora_grpo.engines import compat

for _name in ("vllm.entrypoints.llm", "lora_grpo.bench.suite"):
# Nobody has to look through all that again for garbage.
gc.freeze()
