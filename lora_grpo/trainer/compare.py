"""Two versions side by side: sampled in one engine batch, each one's answers scored by both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.config_file import load_config
from lora_grpo.data import load_prompts
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.advantages import weighted_rewards
from lora_grpo.rewards import RewardFunction, check_columns, load_reward, score
from lora_grpo.trainer.build import effective_grpo
from lora_grpo.trainer.replay import replaying
from lora_grpo.types import Group, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion: its reward (None without reward functions), its tokens, and the sum of its tokens' log-probs
    under both versions, nats at temperature 1."""

    prompt: Prompt
    version: int | None
    text: str
    reward: float | None
    tokens: int
    logp_first: float
    logp_second: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Means over all answers of each version, and their difference (second - first) with its standard error over
    prompts, which are paired (None for one prompt)."""

    first: float
    second: float
    difference: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of versions number `first` and `second`: `reward` and `tokens` of the answers; `logp_first_answers`: how the
    versions score, in nats per token, what the first one said, `logp_second_answers` what the second one said. Their
    differences estimate -KL(first | second) and KL(second | first) a token.
    """

    first: int
    second: int
    reward: Difference | None
    tokens: Difference
    logp_first_answers: Difference
    logp_second_answers: Difference
    answers: tuple[Answer, ...]


def compare_run(
    run_dir: str | Path,
    first: Target,
    second: Target,
    prompts: str | Path,
    *,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Sample `samples` answers a prompt from two versions of a stored run, stopped or live, and score all under both.

    The engine is its own, and has two slots, so that both versions' rows share its batches; each is proven first.
    `prompts` is a file. The run's reward functions are used where it has the columns that they need; without those,
    `reward` is None. Raises `ConfigError`, `UnknownVersion`, `DeliveryError` or `EngineError`.
    """
    run = Path(run_dir)
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
    sampling = Sampling(
        n=samples,
        max_tokens=grpo.max_completion_length,
        temperature=grpo.temperature if temperature is None else temperature,
        seed=seed,
    )
    slots = config.engine.replace(max_loras=max(2, config.engine.max_loras))
    with replaying(run, config.replace(engine=slots), pair) as (engine, pair, _):
        for version in pair:
            engine.load(version)
        each = [version for version in pair for _ in texts]
        groups = engine.generate([*texts, *texts], sampling, adapter=each)
        scored = [_scores(engine, groups, version) for version in pair]
    answers = _answers(groups, _rewards(functions, grpo.reward_weights, groups, columns), scored)
    return _comparison(pair[0], pair[1], answers, samples)


def _comparison(first: AdapterVersion, second: AdapterVersion, answers: tuple[Answer, ...], samples: int) -> Comparison:
    def values(found: Iterable[float | None]) -> torch.Tensor:
        """By version, prompt and sample; NaN where there is none."""
        known = [math.nan if value is None else value for value in found]
        return torch.tensor(known, dtype=torch.float64).view(2, -1, samples)

    rewards = values(answer.reward for answer in answers)
    # Per token, so that long answers do not outweigh the others by their length alone.
    by_first = values(answer.logp_first / max(1, answer.tokens) for answer in answers)
    by_second = values(answer.logp_second / max(1, answer.tokens) for answer in answers)
    return Comparison(
        first.number,
        second.number,
        None if rewards.sum(0).isnan().all() else _difference(*rewards),
        _difference(*values(answer.tokens for answer in answers)),
        _difference(by_first[0], by_second[0]),
        _difference(by_first[1], by_second[1]),
        answers,
    )


def _difference(first_PS: torch.Tensor, second_PS: torch.Tensor) -> Difference:
    """Of pairs that have both values: an answer that no function scores has none."""
    apart_PS = second_PS - first_PS
    by_prompt = apart_PS.nanmean(1)
    by_prompt = by_prompt[~by_prompt.isnan()]
    error = float(by_prompt.std()) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else None
    one, other = (float(values_PS[~apart_PS.isnan()].mean()) for values_PS in (first_PS, second_PS))
    return Difference(one, other, other - one, error)


def _rewards(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    groups: Sequence[Group],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    if not functions:
        return [None for group in groups for _ in group.completions]
    doubled = {name: [*values, *values] for name, values in columns.items()}
    rewards_BF = torch.tensor(score(functions, groups, doubled), dtype=torch.float64)
    return [None if reward.isnan() else float(reward) for reward in weighted_rewards(rewards_BF, weights)]


def _scores(engine: Engine, groups: Sequence[Group], version: AdapterVersion) -> list[float]:
    """Sum of the completion tokens' log-probs under `version`, nats at temperature 1; one engine call."""
    rows = [(group.prompt_token_ids, completion.token_ids) for group in groups for completion in group.completions]
    logp = engine.logprobs([[*prompt, *tokens] for prompt, tokens in rows], adapter=version)
    return [math.fsum(row[len(prompt) - 1 :]) for row, (prompt, _) in zip(logp, rows, strict=True)]


def _answers(
    groups: Sequence[Group], rewards: Sequence[float | None], scored: Sequence[Sequence[float]]
) -> tuple[Answer, ...]:
    completions = [(group.prompt, completion) for group in groups for completion in group.completions]
    return tuple(
        Answer(prompt, done.version, done.text, reward, len(done.token_ids), one, two)
        for (prompt, done), reward, one, two in zip(completions, rewards, *scored, strict=True)
    )
