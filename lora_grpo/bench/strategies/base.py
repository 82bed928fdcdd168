"""The seam: what a strategy is to the measurements."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_grpo.bench.levels import Levels
from lora_grpo.bench.plan import Subject
from lora_grpo.bench.strategies.trainer import Trainer
from lora_grpo.engines.local.weights import drop_weights
from lora_grpo.types import Group, Sampling


@dataclass(frozen=True, slots=True)
class Synced:
    """One sync: seconds by phase until the engine can sample from the new policy, what had to cross, and what was left
    to do afterwards.

    `moved_bytes` is by channel of `timing.measure_bandwidth`.
    """

    seconds: dict[str, float]
    moved_bytes: dict[str, int]
    afterwards_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class Strategy(ABC):
    """A trainer's adapter on its way to an engine, again and again."""

    trainer: Trainer
    engine: Any
    loader: str | None = None
    """How our engine took the last sync's adapter; None where another engine does."""
    load_calls: int | None = None
    """Calls of vLLM's `load_weights` that the last sync made; None where no weights are pushed."""
    at_once: bool = False
    """A merge hands its weights over in one call."""
    remember_pushed: bool = False
    """Keep copies of what a sync pushes, so that `served_weight` can tell; costs memory and time."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.levels = Levels(subject.device)
        self.load()
        self.base_logprobs = self.logprobs(subject.sequences())

    def load(self) -> None:
        """Load the trainer, then the engine; `levels` sees what each takes."""
        self.trainer = Trainer(self.subject)
        self.levels.seen("trainer")
        self.start()
        self.levels.seen("engine")

    @abstractmethod
    def start(self) -> None:
        """Start the engine on `self.subject`, for `self.trainer`."""

    @abstractmethod
    def sync(self) -> Synced:
        """Have the engine serve the trainer's policy as it is now."""

    def renew(self) -> Synced:
        """A sync after a step of the trainer."""
        self.trainer.step()
        return self.sync()

    def same_bits(self) -> bool | None:
        """Whether a trainer on shared weights sees the checkpoint's, bit for bit; None where it has its own."""
        return None

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs of what is served; of the base before the first sync."""
        return self.engine.logprobs(sequences, **self.served())

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Group]:
        """Completions of what is served."""
        return self.engine.generate(prompts, sampling, **self.served())

    def served(self) -> dict[str, Any]:
        """How the engine is told whom to sample from; a stock one serves what it was given last."""
        return {}

    @abstractmethod
    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        """The weight that the engine computes with at `path`, fp32, given the base's; after `sync` with
        `remember_pushed`."""

    def close(self) -> None:
        """Stop the engine and remove files."""
        self.engine.close()

    def drop_base(self) -> None:
        """Let go of every weight of the base, to see what they took; neither side can be used afterwards."""
        self.trainer.drop_base()
        drop_weights(self.engine)

    @abstractmethod
    def rollback_cases(self) -> dict[str, int]:
        """The ways back to an earlier version that differ in cost -> syncs in between that bring such a case about."""

    @abstractmethod
    def mark(self) -> Any:
        """What `rollback` needs to come back to what was synced last."""

    @abstractmethod
    def rollback(self, mark: Any) -> Synced:
        """Have engine and trainer back on what was marked."""

    @property
    def folder(self) -> Path:
        """For the strategy's own files; no other process's."""
        return Path(self.subject.tmpfs, str(os.getpid()))


def engine_arguments(subject: Subject) -> dict[str, Any]:
    """What every engine of a comparison is started with."""
    names = ("max_model_len", "max_num_seqs", "gpu_memory_utilization")
    arguments: dict[str, Any] = {name: getattr(subject, name) for name in names}
    if subject.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = subject.kv_cache_bytes
    if subject.graphs != "alone" or subject.device == "cpu":
        # Nothing captured, or vLLM's default: compiled, graphs of many sizes.
        return {**arguments, "enforce_eager": subject.graphs is not True}
    # Graphs of whole decode steps of the rows that are measured.
    alone = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted({*subject.rows})}
    return {**arguments, "enforce_eager": False, "compilation_config": alone}
