"""GRPO for LoRA adapters on vLLM, without ever merging.

Names resolve when they are first used: importing the package loads neither torch nor vllm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_grpo import errors
from lora_grpo.errors import *  # noqa: F403 - every error is public

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore as AdapterStore
    from lora_grpo.adapters.upkeep.retention import Retention as Retention
    from lora_grpo.adapters.upkeep.retention import keep_archived as keep_archived
    from lora_grpo.adapters.upkeep.retention import keep_best as keep_best
    from lora_grpo.adapters.upkeep.retention import keep_every as keep_every
    from lora_grpo.adapters.upkeep.retention import keep_latest as keep_latest
    from lora_grpo.adapters.upkeep.retention import keep_trainer_state as keep_trainer_state
    from lora_grpo.adapters.version import AdapterVersion as AdapterVersion
    from lora_grpo.cli.report import write_report as write_report
    from lora_grpo.config import EngineConfig as EngineConfig
    from lora_grpo.config import KeepConfig as KeepConfig
    from lora_grpo.config import ModelConfig as ModelConfig
    from lora_grpo.config import RunConfig as RunConfig
    from lora_grpo.engines.base import Engine as Engine
    from lora_grpo.engines.fake import FakeEngine as FakeEngine
    from lora_grpo.engines.server.engine import VLLMServerEngine as VLLMServerEngine
    from lora_grpo.engines.vllm_local import VLLMEngine as VLLMEngine
    from lora_grpo.grpo_config import GRPOConfig as GRPOConfig
    from lora_grpo.integrations.own_loop import answer_requests as answer_requests
    from lora_grpo.sync import NativeSync as NativeSync
    from lora_grpo.trainer.forking import fork as fork
    from lora_grpo.trainer.grpo_trainer import GRPOTrainer as GRPOTrainer
    from lora_grpo.trainer.guards import Guard as Guard
    from lora_grpo.trainer.guards import LogprobGap as LogprobGap
    from lora_grpo.trainer.guards import NonFinite as NonFinite
    from lora_grpo.trainer.guards import ReferenceKL as ReferenceKL
    from lora_grpo.trainer.guards import RewardCollapse as RewardCollapse
    from lora_grpo.trainer.hub import push_to_hub as push_to_hub
    from lora_grpo.trainer.population.population import Population as Population
    from lora_grpo.trainer.spec import MemberSpec as MemberSpec
    from lora_grpo.types import Completion as Completion
    from lora_grpo.types import Group as Group
    from lora_grpo.types import Sampling as Sampling

_NAMES = {
    "adapters.store": ("AdapterStore",),
    "adapters.upkeep.retention": (
        "Retention",
        "keep_archived",
        "keep_best",
        "keep_every",
        "keep_latest",
        "keep_trainer_state",
    ),
    "adapters.version": ("AdapterVersion",),
    "cli.report": ("write_report",),
    "config": ("EngineConfig", "KeepConfig", "ModelConfig", "RunConfig"),
    "engines.base": ("Engine",),
    "engines.fake": ("FakeEngine",),
    "engines.server.engine": ("VLLMServerEngine",),
    "engines.vllm_local": ("VLLMEngine",),
    "errors": tuple(name for name in vars(errors) if name[0].isupper()),
    "grpo_config": ("GRPOConfig",),
    "integrations.own_loop": ("answer_requests",),
    "sync": ("NativeSync",),
    "trainer.forking": ("fork",),
    "trainer.grpo_trainer": ("GRPOTrainer",),
    "trainer.guards": ("Guard", "LogprobGap", "NonFinite", "ReferenceKL", "RewardCollapse"),
    "trainer.hub": ("push_to_hub",),
    "trainer.population.population": ("Population",),
    "trainer.spec": ("MemberSpec",),
    "types": ("Completion", "Group", "Sampling"),
}
_HOMES = {name: f"lora_grpo.{module}" for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
