"""A conversation with stored versions of a run: each answer is of the version that is named, loaded and proven."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.peft_form.export import Recipe
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import LoraSettings, RunConfig
from lora_grpo.config_file import RESOLVED_FILE, config_of_model, load_config
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.requests import render
from lora_grpo.trainer.replay import Borrow, borrowing, replaying
from lora_grpo.types import Chat, Message, Prompt, Sampling

PIECE_TOKENS = 8
"""An answer is asked for and shown so many tokens at a time; prefix caching keeps what was computed before."""


class Conversation:
    """Turns of a person and of versions. Without a chat template each line is completed by itself, as plain text."""

    def __init__(self, engine: Engine, borrow: Borrow, config: RunConfig, sampling: Sampling) -> None:
        self._engine, self._borrow, self._config, self._sampling = engine, borrow, config, sampling
        self._tokenizer: Any = getattr(engine, "tokenizer", None)
        self.has_template = bool(getattr(self._tokenizer, "chat_template", None))
        self.version: AdapterVersion | None = None
        self.cut = False
        """Whether the last answer reached the most tokens that an answer may have."""
        self.forget()

    def switch(self, to: Target) -> LoadReceipt:
        """Have another version answer from now on; what was said before stays. One that fails leaves it as it was."""
        version = self._borrow(to)
        receipt = self._engine.load(version)
        self.version = version
        return receipt

    def forget(self) -> None:
        """Begin anew."""
        system = self._config.data.system_prompt
        self.turns: list[Message] = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """The version's answer in pieces, as it is sampled. Raises `ConfigError` for what leaves no room for one."""
        turns = [*self.turns, {"role": "user", "content": text}]
        kwargs = self._config.grpo.chat_template_kwargs
        prompt: Prompt = Chat(turns, kwargs) if self.has_template else text
        ids, said, shown, self.cut = render(self._tokenizer, prompt, "the conversation"), list[int](), "", True
        while self.cut and len(said) < self._sampling.max_tokens:
            piece = replace(self._sampling, max_tokens=min(PIECE_TOKENS, self._sampling.max_tokens - len(said)))
            [group] = self._engine.generate([[*ids, *said]], piece, adapter=self.version)
            said += group.completions[0].token_ids
            self.cut = group.completions[0].truncated
            whole = self._tokenizer.decode(said, skip_special_tokens=True)
            # Half a character ends in a replacement character until its other bytes are there.
            whole = whole.rstrip("\ufffd") if self.cut else whole
            yield whole[len(shown) :]
            shown = whole
        if self.has_template:
            self.turns = [*turns, {"role": "assistant", "content": shown}]


@contextmanager
def conversing(run: Path, first: Target, temperature: float | None = None) -> Iterator[Conversation]:
    """A conversation with a stopped or a live run, in an engine of its own; `first` is loaded and proven.

    It samples as the run does, or at `temperature`. Raises `UnknownVersion`, or what the engine or a proof meets.
    """
    config = _settings(run)
    grpo = config.grpo
    sampling = Sampling(
        max_tokens=grpo.max_completion_length, temperature=grpo.temperature if temperature is None else temperature
    )
    with borrowing(run) as borrow:
        borrow(first)  # before an engine starts for nothing
        with replaying(run, config) as engine:
            conversation = Conversation(engine, borrow, config, sampling)
            conversation.switch(first)
            yield conversation


def _settings(run: Path) -> RunConfig:
    """What the run was made with; of one that a program made, its base and ranks, and defaults."""
    if (run / RESOLVED_FILE).is_file():
        return load_config(run)
    adapter = Recipe.read(run).config
    config = config_of_model(adapter["base_model_name_or_path"])
    lora = LoraSettings(r=adapter["r"], rank_pattern=adapter.get("rank_pattern") or {})
    found: RunConfig = config.replace(lora=lora, model=config.model.replace(revision=adapter.get("revision")))
    return found
