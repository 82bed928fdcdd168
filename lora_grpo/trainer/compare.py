"""Two versions side by side: sampled in one engine batch, each one's answers scored by both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.data import load_prompts
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.advantages import weighted_rewards
from lora_grpo.rewards import RewardFunction, check_columns, load_reward, score
from lora_grpo.trainer.build import effective_grpo
from lora_grpo.trainer.replay import borrowing, replaying, run_config
from lora_grpo.types import Completion, Group, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion: its reward (None without reward functions), its tokens, and the sum of its tokens' log-probs
    under both versions, nats at temperature 1."""

    prompt: Prompt
    version: int
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
    """`reward` and `tokens` of the answers; `logp_first_answers`: how the versions score, in nats a token, what the
    first one said, `logp_second_answers` what the second one said. Their differences estimate -KL(first | second) and
    KL(second | first) a token.
    """

    first: AdapterVersion
    second: AdapterVersion
    reward: Difference | None
    tokens: Difference
    logp_first_answers: Difference
    logp_second_answers: Difference
    answers: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        names = ("reward", "tokens", "logp_first_answers", "logp_second_answers")
        return {
            "first": self.first.number,
            "second": self.second.number,
            **{name: None if (value := getattr(self, name)) is None else asdict(value) for name in names},
            "answers": [asdict(answer) for answer in self.answers],
        }


def compare_versions(
    engine: Engine,
    first: AdapterVersion,
    second: AdapterVersion,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    reward_funcs: Sequence[RewardFunction] = (),
    reward_weights: Sequence[float] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Comparison:
    """Sample `sampling.n` answers a prompt from each version in one call, and score all of them under both.

    With two slots (`max_loras=2`), the rows share the engine's batches. Versions that are not loaded are loaded and
    proven first, and stay loaded; servers that a trainer was proven with take them from its `NativeSync` alone.
    `columns` hold the prompts' columns for the reward functions. Raises `ConfigError`, `DeliveryError` or
    `EngineError`.
    """
    if first == second:
        raise ConfigError(f"{first} is compared with itself; name two versions")
    for version in (first, second):
        engine.load(version)
    count = len(prompts)
    if not count:
        raise ConfigError("there are no prompts to compare on; give at least one")
    groups = engine.generate([*prompts, *prompts], sampling, adapter=[first] * count + [second] * count)
    rewards = _rewards(reward_funcs, reward_weights, groups, columns or {})
    scored = [_scores(engine, groups, version) for version in (first, second)]
    completions = [(group, completion) for group in groups for completion in group.completions]
    answers = tuple(
        _answer(group.prompt, completion, reward, one, two)
        for (group, completion), reward, one, two in zip(completions, rewards, *scored, strict=True)
    )
    half = len(answers) // 2
    return Comparison(
        first,
        second,
        _paired(*_each(answers, half, "reward"), sampling.n) if reward_funcs else None,
        _paired(*_each(answers, half, "tokens"), sampling.n),
        _under_both(answers[:half], sampling.n),
        _under_both(answers[half:], sampling.n),
        answers,
    )


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
    """`compare_versions` on a stored run, stopped or live, in an engine of its own; `prompts` is a file of prompts.

    The run's reward functions are used where the file has the columns that they need; without those, `reward` is None.
    """
    run = Path(run_dir)
    config = run_config(run)
    data = load_prompts(prompts, prompt_column=config.data.prompt_column, system_prompt=config.data.system_prompt)
    grpo, functions = effective_grpo(config), [load_reward(reward) for reward in config.rewards]
    data = replace(data, chat_template_kwargs=grpo.chat_template_kwargs)
    try:
        check_columns(functions, data.column_names)
    except ConfigError:
        functions = []
    sampling = Sampling(
        n=samples,
        max_tokens=grpo.max_completion_length,
        temperature=grpo.temperature if temperature is None else temperature,
        seed=seed,
    )
    texts, columns = data.select(range(len(data)))
    slots = config.engine.replace(max_loras=max(2, config.engine.max_loras))
    with borrowing(run) as borrow:
        one, two = borrow(first), borrow(second)
        with replaying(run, config.replace(engine=slots)) as engine:
            return compare_versions(
                engine,
                one,
                two,
                texts,
                sampling,
                reward_funcs=functions,
                reward_weights=grpo.reward_weights,
                columns=columns,
            )


def _rewards(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    groups: Sequence[Group],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    rows = sum(len(group.completions) for group in groups)
    if not functions:
        return [None] * rows
    import torch

    doubled = {name: [*values, *values] for name, values in columns.items()}
    rewards_B = weighted_rewards(torch.tensor(score(functions, groups, doubled), dtype=torch.float64), weights)
    return [float(reward) for reward in rewards_B]


def _scores(engine: Engine, groups: Sequence[Group], version: AdapterVersion) -> list[float]:
    """Sum of the completion tokens' log-probs under `version`, nats at temperature 1; one engine call."""
    rows = [(group.prompt_token_ids, completion.token_ids) for group in groups for completion in group.completions]
    logp = engine.logprobs([[*prompt, *tokens] for prompt, tokens in rows], adapter=version)
    return [math.fsum(row[len(prompt) - 1 :]) for row, (prompt, _) in zip(logp, rows, strict=True)]


def _answer(prompt: Prompt, completion: Completion, reward: float | None, one: float, two: float) -> Answer:
    if completion.version is None:
        raise ConfigError("a completion carries no version; the engine must stamp it")
    return Answer(prompt, completion.version, completion.text, reward, len(completion.token_ids), one, two)


def _each(answers: Sequence[Answer], half: int, field: str) -> tuple[list[float], list[float]]:
    values = [float(getattr(answer, field)) for answer in answers]
    return values[:half], values[half:]


def _under_both(answers: Sequence[Answer], samples: int) -> Difference:
    """Per token, so that long answers do not outweigh the others by their length alone."""
    return _paired(
        [answer.logp_first / max(1, answer.tokens) for answer in answers],
        [answer.logp_second / max(1, answer.tokens) for answer in answers],
        samples,
    )


def _paired(first: Sequence[float], second: Sequence[float], samples: int) -> Difference:
    apart = [b - a for a, b in zip(first, second, strict=True)]
    by_prompt = [statistics.fmean(apart[start : start + samples]) for start in range(0, len(apart), samples)]
    error = statistics.stdev(by_prompt) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else None
    return Difference(statistics.fmean(first), statistics.fmean(second), statistics.fmean(apart), error)
