"""The population of `test_population` as a process of its own, which kills itself in its second round.

python -m tests.tiny_population BASE FOLDER [SERVER]...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.trainer.population.population import Population
from tests.conftest import ENGINE_ARGS
from tests.test_population import length, share_of_low_bytes, specs


def kill(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
    if trainer_state.global_step == 2:
        for member in population.members:
            member.runs.store.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return length(completions)


kill.__name__ = length.__name__
first, second, third = specs(Path(sys.argv[2]))
second = replace(second, reward_funcs=[kill, share_of_low_bytes])
urls = tuple(sys.argv[3:])
base = ModelConfig(name=sys.argv[1], dtype="float32")
config = EngineConfig(urls=urls) if urls else EngineConfig(dtype="float32", **ENGINE_ARGS)
with Population(base, [first, second, third], engine_config=config) as population:
    population.train()
