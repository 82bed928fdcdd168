"""Puts a trainer's parts together: engine, PEFT model, store, sync, policy, prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_grpo.adapters.retention import Retention, keep_archived, keep_best, keep_latest, keep_trainer_state
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import EngineConfig, GRPOConfig, KeepConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.metrics import Reporter
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.models import (
    build_engine,
    build_policy_model,
    check_same_device,
    lora_rank,
    pad_token_id,
    planned_memory,
)


@dataclass(frozen=True)
class Parts:
    """What a trainer drives."""

    engine: Engine
    model: nn.Module
    store: AdapterStore
    policy: Policy
    sync: NativeSync
    pad_token_id: int


def assemble(
    closing: ExitStack,
    reporter: Reporter,
    config: GRPOConfig,
    *,
    model: ModelConfig | nn.Module,
    peft_config: Any,
    processing_class: Any,
    engine: Engine | None,
    engine_config: EngineConfig,
    keep: KeepConfig,
    run_dir: Path,
    store_root: str | Path | None,
) -> Parts:
    """Build what is not given, the engine first; `closing` gets what must be closed, in the right order."""
    if engine is None:
        reporter.message(f"memory: {planned_memory(model, peft_config, engine_config)}")
        reporter.message("starting the engine")
        with reporter.capture():
            engine = build_engine(model, engine_config, lora_rank(model, peft_config))
        closing.callback(engine.close)
    policy_model: Any = build_policy_model(model, peft_config, config.seed)
    check_same_device(policy_model, engine)
    store = AdapterStore(store_root, archive=run_dir, retention=retention(keep), budget_bytes=keep.budget_bytes)
    closing.callback(store.close)
    policy = Policy(policy_model, config)
    sync = NativeSync(
        policy_model,
        engine,
        store,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        keep_state=keeps_state(keep),
    )
    closing.callback(sync.close)
    tokenizer = processing_class or getattr(engine, "tokenizer", None)
    return Parts(engine, policy_model, store, policy, sync, pad_token_id(tokenizer))


def retention(keep: KeepConfig) -> Retention:
    """The store's policy for a run's settings."""
    rules = keep_latest(keep.on_tmpfs) | keep_trainer_state(keep_latest(keep.trainer_states))
    if keep.archived is not None:
        archived = keep_latest(keep.archived) | keep_best("reward", keep.archived) | keep_best("eval/reward", 3)
        rules |= keep_archived(archived)
    return rules


def keeps_state(keep: KeepConfig) -> Callable[[AdapterVersion], bool]:
    return lambda version: version.step % keep.trainer_state_every == 0
