"""Puts a trainer's parts together: engine, PEFT model, store, sync, policy, prompts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_grpo.adapters.keeping import keeps_state, retention
from lora_grpo.adapters.locks import holder
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import EngineConfig, GRPOConfig, KeepConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.errors import StoreLocked
from lora_grpo.metrics import Reporter
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.models import (
    Sharing,
    adapted_leaves,
    build_engine,
    build_policy_model,
    check_same_device,
    check_same_vocabulary,
    lora_rank,
    pad_token_id,
    planned_memory,
    shared_base,
)

__all__ = ["Parts", "assemble", "keeps_state", "refuse_live", "retention"]


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
    share_base_weights: Sharing,
) -> Parts:
    """Build what is not given; `closing` gets what must be closed: the engine first, which reads the store's files."""
    refuse_live(run_dir)
    store = AdapterStore(store_root, archive=run_dir, retention=retention(keep), budget_bytes=keep.budget_bytes)
    closing.callback(store.close)
    if engine is None:
        reporter.message(f"memory: {planned_memory(model, peft_config, engine_config)}")
        reporter.message("starting the engine")
        with reporter.capture():
            engine = build_engine(
                model,
                engine_config,
                lora_rank(model, peft_config),
                targets=adapted_leaves(model, peft_config),
                share_base_weights=share_base_weights is True,
            )
        closing.callback(engine.close)
    with reporter.capture():
        base = shared_base(share_base_weights, model, engine, reporter.message)
        policy_model: Any = build_policy_model(model, peft_config, config.seed, base)
    check_same_device(policy_model, engine)
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
    tokenizer = getattr(engine, "tokenizer", None)
    if processing_class is not None:
        check_same_vocabulary(processing_class, tokenizer)
    return Parts(engine, policy_model, store, policy, sync, pad_token_id(processing_class or tokenizer))


def refuse_live(run_dir: Path) -> None:
    """Raises `StoreLocked` naming the process that has the run open, before anything expensive is started."""
    who = holder(run_dir)
    if who is not None:
        raise StoreLocked(f"{run_dir} is open in {who}; stop that process first, or choose another run directory")
