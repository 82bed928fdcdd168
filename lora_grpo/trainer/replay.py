"""Stored versions of a run in a fresh engine, whoever holds the run: evaluated again, compared, or talked to."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.peft_form.export import Recipe
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import PEFT_FILES, AdapterVersion, Target
from lora_grpo.config import LoraSettings, RunConfig
from lora_grpo.config_file import RESOLVED_FILE, config_of_model, load_config
from lora_grpo.data import load_data, load_prompts
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.requests import render
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.advantages import weighted_rewards
from lora_grpo.metrics.log import ENGINE_LOG, capture_output
from lora_grpo.rewards import check_columns, load_reward, score
from lora_grpo.trainer.build import effective_grpo, lora_config
from lora_grpo.trainer.models import build_engine, lora_rank
from lora_grpo.trainer.rollouts import evaluate, saved_evaluations
from lora_grpo.types import Chat, Group, Message, Prompt, Sampling

Borrow: TypeAlias = Callable[[Target], AdapterVersion]
Replay: TypeAlias = tuple[Engine, list[AdapterVersion], Borrow]
PIECE_TOKENS = 8  # an answer is made and shown so many at a time; prefix caching keeps what was computed before


@contextmanager
def replaying(run: Path, config: RunConfig, targets: Sequence[Target]) -> Iterator[Replay]:
    """An engine for a stored run, the versions that `targets` name, and what others come by. They are copies in a
    folder of their own on tmpfs, so that it does not matter what becomes of the run's."""
    around = tempfile.TemporaryDirectory(prefix="lora-grpo-replay-", dir=disk.tmpfs_home())
    with around as place, AdapterStore(archive=run, readonly=True) as store:

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


def evaluate_run(run: Path, versions: Sequence[Target] | None = None) -> list[dict[str, Any]]:
    """Held-out metrics of stored versions, sampled again from their bytes; one row a version. Default: the first and
    the last that the run evaluated. `recorded` is what the run itself measured, if it did."""
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


@dataclass(frozen=True, slots=True)
class Answer:
    """`reward` is None without reward functions; `logp_*` are sums over the tokens, nats at temperature 1."""

    prompt: Prompt
    version: int | None
    text: str
    reward: float | None
    tokens: int
    logp_first: float
    logp_second: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Means over all answers, their difference (second - first), and its standard error over prompts (None for one)."""

    first: float
    second: float
    difference: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of versions number `first` and `second`: `reward` and `tokens` of the answers; `logp_first_answers`: how the
    versions score, in nats per token, what the first one said, `logp_second_answers` what the second one said. Their
    differences estimate -KL(first | second) and KL(second | first) a token."""

    first: int
    second: int
    reward: Difference | None
    tokens: Difference
    logp_first_answers: Difference
    logp_second_answers: Difference
    answers: tuple[Answer, ...]


def compare_run(
    run: Path, first: Target, second: Target, prompts: Path, *, samples: int, temperature: float | None, seed: int
) -> Comparison:
    """Sample `samples` answers a prompt from two versions, stopped or live, and score all under both, in an engine of
    two slots, whose batches they share. `reward` is None where `prompts` lack columns that reward functions need."""
    config = load_config(run)
    with AdapterStore(archive=run, readonly=True) as store:
        pair = [store.get(first), store.get(second)]
    if pair[0] == pair[1]:
        raise ConfigError(f"{pair[0]} is compared with itself; name two versions")
    grpo, functions = effective_grpo(config), [load_reward(reward) for reward in config.rewards]
    data = load_prompts(prompts, prompt_column=config.data.prompt_column, system_prompt=config.data.system_prompt)
    try:
        check_columns(functions, data.column_names)
    except ConfigError:
        functions = []
    texts, columns = replace(data, chat_template_kwargs=grpo.chat_template_kwargs).select(range(len(data)))
    sampling = replace(_sampling(config, temperature), n=samples, seed=seed)
    slots = config.engine.replace(max_loras=max(2, config.engine.max_loras))
    with replaying(run, config.replace(engine=slots), pair) as (engine, pair, _):
        for version in pair:
            engine.load(version)
        groups = engine.generate([*texts, *texts], sampling, adapter=[version for version in pair for _ in texts])
        scored = [_scores(engine, groups, version) for version in pair]
    rewards_B = torch.full((2 * len(texts) * samples,), math.nan, dtype=torch.float64)
    if functions:
        doubled = {name: [*values, *values] for name, values in columns.items()}
        rewards_BF = torch.tensor(score(functions, groups, doubled), dtype=torch.float64)
        rewards_B = weighted_rewards(rewards_BF, grpo.reward_weights)
    return _comparison(pair, groups, rewards_B, torch.tensor(scored, dtype=torch.float64), samples)


def _comparison(
    pair: list[AdapterVersion], groups: list[Group], rewards_B: torch.Tensor, logp_VB: torch.Tensor, samples: int
) -> Comparison:
    """Of a batch whose first half are the first version's answers; `logp_VB` are their log-probs under each version."""
    completions = [(group.prompt, completion) for group in groups for completion in group.completions]
    answers = tuple(
        Answer(prompt, done.version, done.text, None if math.isnan(reward) else reward, len(done.token_ids), one, two)
        for (prompt, done), reward, one, two in zip(completions, rewards_B.tolist(), *logp_VB.tolist(), strict=True)
    )
    tokens_B = torch.tensor([answer.tokens for answer in answers], dtype=torch.float64)
    rewards_VPS, tokens_VPS = rewards_B.view(2, -1, samples), tokens_B.view(2, -1, samples)
    reward = None if rewards_VPS.sum(0).isnan().all() else _difference(*rewards_VPS)
    # Per token, so that long answers do not outweigh the others by their length alone.
    each_VVPS = (logp_VB / tokens_B.clamp(min=1)).view(2, 2, -1, samples)
    of_first, of_second = (_difference(*by_version) for by_version in each_VVPS.unbind(1))
    return Comparison(pair[0].number, pair[1].number, reward, _difference(*tokens_VPS), of_first, of_second, answers)


def _difference(first_PS: torch.Tensor, second_PS: torch.Tensor) -> Difference:
    """Of pairs that have both values: an answer that no function scores has none."""
    apart_PS = second_PS - first_PS
    by_prompt = apart_PS.nanmean(1)
    by_prompt = by_prompt[~by_prompt.isnan()]
    error = float(by_prompt.std()) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else None
    one, other = (float(values_PS[~apart_PS.isnan()].mean()) for values_PS in (first_PS, second_PS))
    return Difference(one, other, other - one, error)


def _scores(engine: Engine, groups: Sequence[Group], version: AdapterVersion) -> list[float]:
    """Sum of the completion tokens' log-probs under `version`, nats at temperature 1; one engine call."""
    rows = [(group.prompt_token_ids, completion.token_ids) for group in groups for completion in group.completions]
    logp = engine.logprobs([[*prompt, *tokens] for prompt, tokens in rows], adapter=version)
    return [math.fsum(row[len(prompt) - 1 :]) for row, (prompt, _) in zip(logp, rows, strict=True)]


class Conversation:
    """Turns of a person and of versions. Without a chat template each line is completed by itself, as plain text."""

    def __init__(self, engine: Engine, borrow: Borrow, config: RunConfig, sampling: Sampling) -> None:
        self._engine, self._borrow, self._config, self._sampling = engine, borrow, config, sampling
        self._tokenizer: Any = getattr(engine, "tokenizer", None)
        self.has_template = bool(getattr(self._tokenizer, "chat_template", None))
        self.version: AdapterVersion | None = None
        self.cut = False  # whether the last answer reached the most tokens that an answer may have
        self.forget()

    def switch(self, to: Target) -> LoadReceipt:
        """Have another version answer from now on; what was said before stays. One that fails leaves it as it was."""
        version = self._borrow(to)
        receipt = self._engine.load(version)
        self.version = version
        return receipt

    def forget(self) -> None:
        system = self._config.data.system_prompt
        self.turns: list[Message] = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """The version's answer in pieces, as it is sampled. Raises `ConfigError` for what leaves no room for one."""
        turns = [*self.turns, {"role": "user", "content": text}]
        prompt: Prompt = Chat(turns, self._config.grpo.chat_template_kwargs) if self.has_template else text
        ids, said, shown, self.cut = render(self._tokenizer, prompt, "the conversation"), list[int](), "", True
        longest = getattr(self._engine, "max_model_len", len(ids) + self._sampling.max_tokens)
        if (room := min(self._sampling.max_tokens, longest - len(ids))) < 1:
            told = f"what was said has {len(ids):,} tokens, and max_model_len={longest} leaves no room for an answer"
            raise ConfigError(f"{told}: say less, or forget what was said before (/new)")
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
    """With a stopped or a live run, in an engine of its own; `first` is loaded and proven. Raises `UnknownVersion`."""
    if (run / RESOLVED_FILE).is_file():
        config = load_config(run)
    else:  # made by a program: its base and ranks, and defaults
        adapter = Recipe.read(run).config
        config = config_of_model(adapter["base_model_name_or_path"])
        lora = LoraSettings(r=adapter["r"], rank_pattern=adapter.get("rank_pattern") or {})
        config = config.replace(lora=lora, model=config.model.replace(revision=adapter.get("revision")))
    sampling = _sampling(config, temperature)  # refused before an engine starts
    with replaying(run, config, [first]) as (engine, [version], borrow):
        conversation = Conversation(engine, borrow, config, sampling)
        conversation.switch(version)
        yield conversation


def _sampling(config: RunConfig, temperature: float | None) -> Sampling:
    temperature = config.grpo.temperature if temperature is None else temperature
    return Sampling(max_tokens=config.grpo.max_completion_length, temperature=temperature)
