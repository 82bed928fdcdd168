"""What a run is made of, and all that can be known of it before its engine starts, so that nothing ends it later."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from torch import nn
from transformers import AutoTokenizer

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig, RunConfig
from lora_grpo.data import PromptDataset, Rows, load_prompts
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.probe import check_has_room
from lora_grpo.engines.local.targets import check_is_base, checkpoint_config
from lora_grpo.engines.requests import ENCODING, render, require_tokenizer
from lora_grpo.errors import ConfigError, counted
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.reporter import check_trackers
from lora_grpo.rewards import RewardFunction, check_columns, reward_names
from lora_grpo.trainer.guards import Guard
from lora_grpo.trainer.models import Model, checkpoint_of
from lora_grpo.trainer.room import Wanted
from lora_grpo.trl_names import REWARD_MODEL
from lora_grpo.types import Group, Prompt

RolloutFunc: TypeAlias = Callable[[Sequence[Prompt], Engine, AdapterVersion], list[Group]]
"""`f(prompts, engine, version)` -> one group a prompt; `Completion.token_mask` marks the tokens the policy sampled.

The engine renders text and chats as the trainer does; `prompt + [message]` keeps a chat's `chat_template_kwargs`."""


@dataclass(frozen=True)
class MemberSpec:
    """What `GRPOTrainer` takes for a run, less the model and the engine, which the population has.

    `settings`, where the member comes from a file, are written to the run directory when it starts.

    >>> MemberSpec("runs/lr-1e-5", reward, GRPOConfig(learning_rate=1e-5), rows, peft_config=lora).name
    'lr-1e-5'
    """

    run_dir: str | Path
    reward_funcs: RewardFunction | Sequence[RewardFunction]
    config: GRPOConfig
    train_dataset: Rows | PromptDataset | str | Path
    _: KW_ONLY
    peft_config: Any
    eval_dataset: Rows | PromptDataset | str | Path | None = None
    processing_class: Any = None
    keep: KeepConfig | None = None
    store_root: str | Path | None = None
    rollout_func: RolloutFunc | None = None
    guard: Guard | None = None
    settings: RunConfig | None = None

    def arguments(self) -> dict[str, Any]:
        """What a `GRPOTrainer` of this run is built with, on a model and an engine."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}

    @property
    def name(self) -> str:
        """What its directory is called."""
        return Path(self.run_dir).name


@dataclass
class Preflight:
    """What a run would train with what. Each check raises a `LoraGrpoError`, or says in a sentence what it found."""

    model: Model
    spec: MemberSpec
    engine: Engine | None = None
    engine_config: EngineConfig = field(default_factory=EngineConfig)
    num_processes: int = 1

    def __post_init__(self) -> None:
        self.config, held_out = self.spec.config, self.spec.eval_dataset
        if self.spec.train_dataset is None:
            raise ConfigError("train_dataset is missing: pass a Dataset, a list of dicts with 'prompt', or a file")
        self.train = self._read(self.spec.train_dataset)
        self.held_out = None if held_out is None else self._read(held_out)
        self.spec = replace(self.spec, train_dataset=self.train, eval_dataset=self.held_out)
        self.reward_funcs = reward_functions(self.spec.reward_funcs)

    def _read(self, data: Any) -> PromptDataset:
        found = data if isinstance(data, PromptDataset) else load_prompts(data)
        return replace(found, chat_template_kwargs=self.config.chat_template_kwargs)

    def check(self) -> None:
        check_trackers(self.config.report_to)
        self.check_rewards()
        self.check_steps()
        self.check_prompts(self.known_room)

    def check_rewards(self) -> str:
        names, weights = reward_names(self.reward_funcs), self.config.reward_weights
        if weights is not None and len(weights) != len(names):
            of = f"the {len(names)} reward functions ({', '.join(names)})"
            raise ConfigError(f"reward_weights={list(weights)} has {len(weights)} weights for {of}; give one for each")
        for data in filter(None, (self.train, self.held_out)):
            check_columns(self.reward_funcs, data.column_names)
        return ", ".join(f"{w:g} x {name}" for name, w in zip(names, weights or [1.0] * len(names), strict=True))

    def check_steps(self) -> str:
        if isinstance(self.model, ModelConfig):
            check_is_base(self.model.name, revision=self.model.revision)
        if self.spec.guard is not None:
            self.spec.guard.check(self.config)
        rows, each = self.config.rows_per_step(self.num_processes), self.config.num_generations
        updates = self.config.updates_per_step(self.num_processes)
        return f"{self.config.total_steps} of {rows // each} prompts x {each} completions, {updates} updates each"

    def check_prompts(self, max_model_len: int | None) -> str:
        """Every row can be rendered, and fits `max_model_len` where that is known; longer ones go where allowed.
        `train` and `held_out` are afterwards those rows alone."""
        said = []
        for name, (data, lengths) in self._lengths.items():
            fitting = self._fitting(data, lengths, max_model_len)
            dropped, longest = len(data) - len(fitting), max(lengths[row] for row in fitting)
            setattr(self, name, data.only(fitting) if dropped else data)
            said.append(f"{data.label}: {counted(len(fitting), 'prompt')} of at most {counted(longest, 'token')}")
            said[-1] += f", {dropped:,} longer ones dropped" if dropped else ""
        check_has_room(None if self.engine else max_model_len)
        return "; ".join(said)

    @property
    def wanted(self) -> Wanted:
        data, lengths = self._lengths["train"]
        longest = max(lengths[row] for row in self._fitting(data, lengths, self.known_room))
        return Wanted(self.spec.peft_config, self.config, longest)

    @cached_property
    def tokenizer(self) -> Any:
        """What prompts are rendered with. Raises `ConfigError` when it numbers tokens otherwise than the engine's."""
        served = checkpoint_tokenizer(self.model) if self.engine is None else getattr(self.engine, "tokenizer", None)
        if self.spec.processing_class is None:
            return served
        own = getattr(self.spec.processing_class, "tokenizer", self.spec.processing_class)
        if not (hasattr(own, "encode") and hasattr(own, "decode")):
            fix = "pass AutoTokenizer.from_pretrained(NAME)"
            raise ConfigError(f"processing_class={own!r:.80} is not a tokenizer: {fix}")
        check_same_vocabulary(own, served)
        return own

    @property
    def known_room(self) -> int | None:
        """The engine's max_model_len, where that is known before it starts."""
        if self.engine is not None:
            return getattr(self.engine, "max_model_len", None)
        return None if self.engine_config.urls else self.engine_config.max_model_len

    @cached_property
    def _lengths(self) -> dict[str, tuple[PromptDataset, list[int]]]:
        """The data as they were given, and the tokens of each row's prompt."""
        given = (("train", self.train), ("held_out", self.held_out))
        return {name: (data, self._tokens_of(data)) for name, data in given if data is not None}

    def _tokens_of(self, data: PromptDataset) -> list[int]:
        if self.tokenizer is None:
            return [0] * len(data)
        lengths, known = [], _template_names(self.tokenizer)
        for row, prompt in enumerate(data.prompts()):
            called = f"{data.label}, row {row}: the prompt"
            odd = next((name for name in getattr(prompt, "template_kwargs", ()) if known and name not in known), None)
            if odd is not None:
                near = difflib.get_close_matches(odd, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "leave it out"
                raise ConfigError(f"{called} has chat_template_kwargs {odd!r}, which the chat template ignores; {hint}")
            with ENCODING:
                lengths.append(len(render(self.tokenizer, prompt, called)))
        return lengths

    def _fitting(self, data: PromptDataset, lengths: list[int], max_model_len: int | None) -> list[int]:
        longest, most, completion = max(lengths), self.config.max_prompt_length, self.config.max_completion_length
        limits = [] if most is None else [(most, f"max_prompt_length={most}", f"raise that to {longest}")]
        if max_model_len is not None:
            name = f"max_model_len={max_model_len} less max_completion_length={completion}"
            fix = f"raise max_model_len to {longest + completion}"
            if longest < max_model_len:
                fix += f", or lower max_completion_length to {max_model_len - longest}"
            limits.append((max_model_len - completion, name, fix))
        limit, name, fix = min(limits, default=(longest, "", ""))
        over = [row for row, length in enumerate(lengths) if length > limit]
        if over and (self.config.overlong_prompts == "error" or len(over) == len(data)):
            fix += ", or shorten the prompts"
            fix += ", or leave them out with overlong_prompts='drop'" if len(over) < len(data) else ""
            first = f"{data.label}, row {over[0]}: the prompt has {counted(lengths[over[0]], 'token')}"
            rest = f"({len(over):,} of {len(data):,} rows are longer, up to {longest:,})"
            raise ConfigError(f"{first}, and {name} allows {max(0, limit):,} {rest}: {fix}")
        return [row for row, length in enumerate(lengths) if length <= limit]


def _template_names(tokenizer: Any) -> set[str]:
    """What a chat template can be given: its own variables, and what renders it takes; none where nothing tells."""
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        with suppress(TemplateSyntaxError):
            own = find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
            return {*own, *signature(tokenizer.apply_chat_template).parameters}
    return set()


def reward_functions(given: Any) -> list[RewardFunction]:
    functions = list(given) if isinstance(given, list | tuple) else [given]
    for function in functions:
        if isinstance(function, str | nn.Module) or not callable(function):
            shown = repr(function) if isinstance(function, str) else f"a {type(function).__name__}"
            raise ConfigError(f"reward_funcs: {shown} is not a function; {REWARD_MODEL}")
    if not functions:
        raise ConfigError("reward_funcs is empty; give at least one function")
    return functions


def checkpoint_tokenizer(model: Model) -> Any:
    checkpoint = checkpoint_of(model)
    checkpoint_config(checkpoint.name, **checkpoint.loading)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, **checkpoint.loading)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{checkpoint.name} has no tokenizer to read: is tokenizer.json there? {error}") from error
    require_tokenizer(tokenizer, "prompts are text")
    return tokenizer


def check_same_vocabulary(trainer: Any, engine: Any) -> None:
    if not (hasattr(trainer, "get_vocab") and hasattr(engine, "get_vocab")):
        return
    own, served = trainer.get_vocab(), engine.get_vocab()
    odd = next((token for token in own.keys() | served.keys() if own.get(token) != served.get(token)), None)
    if odd is not None:
        told = f"token {odd!r} is {own.get(odd)} in processing_class and {served.get(odd)} in the engine's tokenizer"
        raise ConfigError(f"{told}; load both from the same checkpoint, or leave processing_class out")
