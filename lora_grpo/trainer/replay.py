"""Stored versions of a run in a fresh engine, whoever holds the run: evaluated again, or talked to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.layout import PEFT_FILES
from lora_grpo.adapters.peft_form.export import Recipe
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.config import LoraSettings, RunConfig
from lora_grpo.config_file import RESOLVED_FILE, config_of_model, load_config
from lora_grpo.data import load_data
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.requests import render
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.quiet import ENGINE_LOG, capture_output
from lora_grpo.rewards import load_reward
from lora_grpo.trainer.build import effective_grpo, lora_config
from lora_grpo.trainer.models import build_engine, lora_rank
from lora_grpo.trainer.rollouts import evaluate, saved_evaluations
from lora_grpo.types import Chat, Message, Prompt, Sampling

Borrow: TypeAlias = Callable[[Target], AdapterVersion]
PIECE_TOKENS = 8
"""An answer is asked for and shown so many tokens at a time; prefix caching keeps what was computed before."""


@contextmanager
def replaying(
    run: Path, config: RunConfig, targets: Sequence[Target]
) -> Iterator[tuple[Engine, list[AdapterVersion], Borrow]]:
    """An engine for a stored run, closed at the end, the versions that `targets` name, and what others come by.

    They are copies in a folder of their own on tmpfs, so that it does not matter what becomes of the run's. What the
    engine says while it starts is in `RUN/engine.log`.
    """
    with (
        AdapterStore(archive=run, readonly=True) as store,
        tempfile.TemporaryDirectory(prefix="lora-grpo-replay-", dir=disk.tmpfs_home()) as place,
    ):

        def borrow(target: Target) -> AdapterVersion:
            version = store.get(target)
            folder = Path(place) / "versions" / disk.folder_name(version.number)
            with disk.reported(f"copying {version} of {store.archive}"):
                if not folder.is_dir():
                    source = store.readable(version)
                    folder.mkdir(parents=True)
                    for name in PEFT_FILES:
                        shutil.copyfile(source / name, folder / name)
            return replace(version, path=folder)

        versions = [borrow(target) for target in targets]  # before an engine starts for nothing
        with capture_output(run / ENGINE_LOG):
            rank = max(config.engine.max_lora_rank or 0, lora_rank(config.model, lora_config(config.lora)))
            engine = build_engine(config.model, config.engine.replace(max_lora_rank=rank))
        with closing(engine):
            yield engine, versions, borrow


def evaluate_run(run_dir: str | Path, versions: Sequence[Target] | None = None) -> list[dict[str, Any]]:
    """Held-out metrics of stored versions, sampled again from their bytes; one row a version.

    Default: the first and the last version that the run evaluated. `recorded` is what the run itself measured (None
    where it did not). Raises `ConfigError` or `UnknownVersion`.
    """
    run = Path(run_dir)
    config, saved = load_config(run), saved_evaluations(run)
    _, held_out = load_data(config.data)
    if held_out is None:
        raise ConfigError(f"{run} has no held-out prompts (data.eval)")
    if not (versions or saved):
        raise ConfigError(f"{run} has evaluated no version yet; name one: --version best")
    rewards, grpo = [load_reward(reward) for reward in config.rewards], effective_grpo(config)
    held_out = replace(held_out, chat_template_kwargs=grpo.chat_template_kwargs)
    rows = []
    with replaying(run, config, versions or [min(saved), max(saved)]) as (engine, chosen, _):
        for version in dict.fromkeys(chosen):
            engine.load(version)
            result = evaluate(engine, version, held_out, rewards, grpo)
            recorded = saved[result.version].metrics["reward"] if result.version in saved else None
            about = {"version": result.version, "step": result.step, "prompts": len(result.rows)}
            rows.append({**about, **result.metrics, "recorded": recorded})
    return rows


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
        longest = getattr(self._engine, "max_model_len", len(ids) + self._sampling.max_tokens)
        if (room := min(self._sampling.max_tokens, longest - len(ids))) < 1:
            raise ConfigError(
                f"what was said has {len(ids):,} tokens, and max_model_len={longest} leaves no room for an answer: say "
                "less, or forget what was said before (/new)"
            )
        while self.cut and len(said) < room:
            piece = replace(self._sampling, max_tokens=min(PIECE_TOKENS, room - len(said)))
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
    with replaying(run, config, [first]) as (engine, [version], borrow):
        conversation = Conversation(engine, borrow, config, sampling)
        conversation.switch(version)
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
