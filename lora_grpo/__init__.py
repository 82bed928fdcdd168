"""GRPO for LoRA adapters on vLLM, without ever merging.

Names resolve when they are first used: importing the package loads neither torch nor vllm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.adapters.upkeep.retention import (
        Retention,
        keep_archived,
        keep_best,
        keep_every,
        keep_latest,
        keep_trainer_state,
    )
    from lora_grpo.adapters.version import AdapterVersion
    from lora_grpo.cli.report import write_report
    from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig, RunConfig
    from lora_grpo.engines.base import Engine
    from lora_grpo.engines.fake import FakeEngine
    from lora_grpo.engines.server.engine import VLLMServerEngine
    from lora_grpo.engines.vllm_local import VLLMEngine
    from lora_grpo.errors import (
        ConfigError,
        DeliveryError,
        EngineError,
        LoraGrpoError,
        NoRoom,
        RewardError,
        StoreCorrupt,
        StoreError,
        StoreLocked,
        TrainingError,
        UnknownVersion,
        UnsupportedAdapter,
        UnsupportedVersion,
    )
    from lora_grpo.grpo_config import GRPOConfig
    from lora_grpo.integrations.own_loop import answer_requests
    from lora_grpo.sync import NativeSync
    from lora_grpo.trainer import (
        GRPOTrainer,
        Guard,
        LogprobGap,
        NonFinite,
        ReferenceKL,
        RewardCollapse,
        fork,
        push_to_hub,
    )
    from lora_grpo.trainer.population.population import Population
    from lora_grpo.trainer.population.spec import MemberSpec
    from lora_grpo.types import Completion, Group, Sampling

_HOMES = {
    "AdapterStore": "lora_grpo.adapters.store",
    "AdapterVersion": "lora_grpo.adapters.version",
    "Completion": "lora_grpo.types",
    "ConfigError": "lora_grpo.errors",
    "DeliveryError": "lora_grpo.errors",
    "Engine": "lora_grpo.engines.base",
    "EngineConfig": "lora_grpo.config",
    "EngineError": "lora_grpo.errors",
    "FakeEngine": "lora_grpo.engines.fake",
    "GRPOConfig": "lora_grpo.grpo_config",
    "GRPOTrainer": "lora_grpo.trainer",
    "Group": "lora_grpo.types",
    "Guard": "lora_grpo.trainer",
    "KeepConfig": "lora_grpo.config",
    "LogprobGap": "lora_grpo.trainer",
    "LoraGrpoError": "lora_grpo.errors",
    "MemberSpec": "lora_grpo.trainer.population.spec",
    "ModelConfig": "lora_grpo.config",
    "NativeSync": "lora_grpo.sync",
    "NoRoom": "lora_grpo.errors",
    "NonFinite": "lora_grpo.trainer",
    "Population": "lora_grpo.trainer.population.population",
    "ReferenceKL": "lora_grpo.trainer",
    "Retention": "lora_grpo.adapters.upkeep.retention",
    "RewardCollapse": "lora_grpo.trainer",
    "RewardError": "lora_grpo.errors",
    "RunConfig": "lora_grpo.config",
    "Sampling": "lora_grpo.types",
    "StoreCorrupt": "lora_grpo.errors",
    "StoreError": "lora_grpo.errors",
    "StoreLocked": "lora_grpo.errors",
    "TrainingError": "lora_grpo.errors",
    "UnknownVersion": "lora_grpo.errors",
    "UnsupportedAdapter": "lora_grpo.errors",
    "UnsupportedVersion": "lora_grpo.errors",
    "VLLMEngine": "lora_grpo.engines.vllm_local",
    "VLLMServerEngine": "lora_grpo.engines.server.engine",
    "answer_requests": "lora_grpo.integrations.own_loop",
    "fork": "lora_grpo.trainer",
    "keep_archived": "lora_grpo.adapters.upkeep.retention",
    "keep_best": "lora_grpo.adapters.upkeep.retention",
    "keep_every": "lora_grpo.adapters.upkeep.retention",
    "keep_latest": "lora_grpo.adapters.upkeep.retention",
    "keep_trainer_state": "lora_grpo.adapters.upkeep.retention",
    "push_to_hub": "lora_grpo.trainer",
    "write_report": "lora_grpo.cli.report",
}

__all__ = [
    "AdapterStore",
    "AdapterVersion",
    "Completion",
    "ConfigError",
    "DeliveryError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "FakeEngine",
    "GRPOConfig",
    "GRPOTrainer",
    "Group",
    "Guard",
    "KeepConfig",
    "LogprobGap",
    "LoraGrpoError",
    "MemberSpec",
    "ModelConfig",
    "NativeSync",
    "NoRoom",
    "NonFinite",
    "Population",
    "ReferenceKL",
    "Retention",
    "RewardCollapse",
    "RewardError",
    "RunConfig",
    "Sampling",
    "StoreCorrupt",
    "StoreError",
    "StoreLocked",
    "TrainingError",
    "UnknownVersion",
    "UnsupportedAdapter",
    "UnsupportedVersion",
    "VLLMEngine",
    "VLLMServerEngine",
    "answer_requests",
    "fork",
    "keep_archived",
    "keep_best",
    "keep_every",
    "keep_latest",
    "keep_trainer_state",
    "push_to_hub",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
