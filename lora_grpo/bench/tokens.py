"""The tokens that workers are asked about."""

from __future__ import annotations

from lora_grpo.bench.plan import Subject

ROWS, TOKENS = 4, 32


def sequences(subject: Subject) -> list[list[int]]:
    """Fixed random tokens, the same in every process of a model."""
    return fresh_prompts(subject, ROWS, TOKENS, seed=subject.seed)


def fresh_prompts(subject: Subject, rows: int, tokens: int, *, seed: int | None = None) -> list[list[int]]:
    """Random token ids; without a seed, different each time."""
    import torch
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(subject.model).get_text_config().vocab_size
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = torch.randint(1, vocabulary, (rows, tokens), generator=generator).tolist()
    return drawn
