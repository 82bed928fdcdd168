"""A strategy that is ready to be measured, and the tokens that every process asks it about."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_grpo.bench.levels import Levels
from lora_grpo.bench.plan import Subject

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy

ROWS, TOKENS = 4, 32


@dataclass
class Bench:
    """What a piece of work is given: the strategy, and what was seen while it was prepared."""

    strategy: Strategy
    subject: Subject
    base_logprobs: list[list[float]]
    """Of `sequences`, before the first sync."""
    levels: Levels
    """What trainer and engine grew by when they were loaded."""


def sequences(subject: Subject) -> list[list[int]]:
    """Fixed random tokens, the same in every process of a model."""
    return _drawn(subject, ROWS, TOKENS, subject.seed)


def fresh_prompts(bench: Bench, rows: int, tokens: int) -> list[list[int]]:
    """Random token ids, different each time."""
    return _drawn(bench.subject, rows, tokens)


def _drawn(subject: Subject, rows: int, tokens: int, seed: int | None = None) -> list[list[int]]:
    import torch
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(subject.model).get_text_config().vocab_size
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = torch.randint(1, vocabulary, (rows, tokens), generator=generator).tolist()
    return drawn


def prepare(subject: Subject) -> Bench:
    """Load trainer and engine of a subject."""
    from lora_grpo.bench.strategies import load_strategy
    from lora_grpo.engines import compat

    compat.import_vllm()
    subject = replace(subject, tmpfs=_own(subject.tmpfs), disk=_own(subject.disk))
    strategy = load_strategy(subject.strategy)()
    levels = Levels(subject.device)
    strategy.prepare(subject, levels.seen)
    return Bench(strategy, subject, strategy.logprobs(sequences(subject)), levels)


def _own(folder: str) -> str:
    return os.path.join(folder, str(os.getpid()))
