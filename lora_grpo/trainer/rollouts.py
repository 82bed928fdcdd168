"""Prompts completed by one named version, and scored: a step's batch in its order, or all that are held out."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_grpo.adapters.files.disk import folder_name, parse_json, read_small, replace_file
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.data import PromptDataset, PromptSampler
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError, DeliveryError, StoreCorrupt
from lora_grpo.grpo.advantages import group_advantages, weighted_rewards
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.log import jsonable
from lora_grpo.rewards import RewardContext, RewardFunction, reward_names, score
from lora_grpo.trainer.assembly import Parts
from lora_grpo.trainer.preflight import RolloutFunc
from lora_grpo.types import Group, Prompt, Sampling, derive_seed

EVALUATIONS = "evaluations"  # of a run directory

T = TypeVar("T")


@dataclass
class Rollout:
    step: int
    position: dict[str, int]  # where the data stood before its prompts were drawn
    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    version: AdapterVersion = field(init=False)  # set when it begins
    groups: list[Group] = field(init=False)  # set when it ends


@dataclass(frozen=True)
class Rewarded:
    """A step's completions with what they earned: rewards_BF by function, rewards_B weighted, advantages_B."""

    groups: list[Group]
    rewards_BF: torch.Tensor
    rewards_B: torch.Tensor
    advantages_B: torch.Tensor
    logged: Mapping[str, float]
    extra: Mapping[str, list[Any]]  # columns that reward functions logged, a value a completion, as JSON has them


@dataclass
class Source:
    """Where batches come from: each is sampled when its step begins, from the version published before."""

    config: GRPOConfig
    parts: Parts
    data: PromptDataset
    sampler: PromptSampler
    rollback_log: RollbackLog
    reward_funcs: Sequence[RewardFunction]
    rollout_func: RolloutFunc | None = None  # in place of the engine's `generate`
    dropped: dict[str, int] = field(init=False, default_factory=dict)  # rollouts dropped so far, by reason

    def running(self) -> AbstractContextManager[None]:
        """Around a call of `train`: outside nothing is sampled."""
        return nullcontext()

    def take(self, step: int) -> Rollout:
        rollout = self.draw(step)
        self.sample(rollout, self.parts.sync.head)
        return rollout

    def draw(self, step: int) -> Rollout:
        return Rollout(step, self.sampler.state_dict(), *self.data.select(next(self.sampler)))

    def sample(self, rollout: Rollout, version: AdapterVersion) -> None:
        rollout.version = version
        if self.rollout_func is None:
            rollout.groups = self.parts.rendering.generate(rollout.prompts, self.sampling(rollout), adapter=version)
        else:
            rollout.groups = self.rollout_func(rollout.prompts, self.parts.rendering, version)
        self.check(rollout)

    def sampling(self, rollout: Rollout) -> Sampling:
        """How its prompts are sampled. Seeds depend on how often the run was rolled back: no collapse is replayed."""
        config, seed = self.config, derive_seed(self.config.seed, rollout.step, len(self.rollback_log))
        n, most, temperature = config.num_generations, config.max_completion_length, config.temperature
        return Sampling(n=n, max_tokens=most, temperature=temperature, seed=seed)

    def check(self, rollout: Rollout) -> None:
        """Raises `ConfigError` or `DeliveryError` for groups that cannot be trained on."""
        groups, prompts, version = rollout.groups, len(rollout.prompts), rollout.version
        sizes = {len(group.completions) for group in groups}
        if len(groups) != prompts or sizes != {self.config.num_generations}:
            wanted = f"{prompts} groups of num_generations={self.config.num_generations}"
            raise ConfigError(f"the rollout gave {len(groups)} groups of sizes {sorted(sizes)}; it must give {wanted}")
        for index, group in enumerate(groups):
            if strangers := {completion.version for completion in group.completions} - {version.number}:
                told = f"prompt {index} was completed by version {sorted(map(str, strangers))}, not by {version}"
                raise DeliveryError(f"{told}; pass adapter=version to engine.generate")
            if not all(completion.token_ids for completion in group.completions):
                raise DeliveryError(f"prompt {index} has a completion without tokens")

    def reward(self, rollout: Rollout) -> Rewarded:
        config = self.config
        context = RewardContext(rollout.step, config.total_steps)
        values_BF = score(self.reward_funcs, rollout.groups, rollout.columns, context, config)
        rewards_BF = torch.tensor(values_BF, dtype=torch.float64)
        rewards_B = weighted_rewards(rewards_BF, config.reward_weights)
        advantages_B = group_advantages(rewards_B, config.num_generations, config.scale_rewards)
        logged, extra = context.metrics(), jsonable(context.extra)
        return Rewarded(rollout.groups, rewards_BF, rewards_B, advantages_B, logged, extra)

    def score(self, function: Callable[[], T]) -> T:
        """Call reward functions on other completions."""
        return function()

    def metrics(self) -> dict[str, float]:
        """Of the batch that was taken last, and what was dropped so far."""
        return {}

    def position(self) -> dict[str, int]:
        """Where the data stand: what is drawn next, or was drawn for a batch that no step has taken yet."""
        return self.sampler.state_dict()

    def drop(self, why: str) -> None:
        """Forget every batch that no step has taken, and draw its prompts again later."""

    def close(self) -> None:
        """End the threads, where there are any."""


# Held-out prompts.


@dataclass(frozen=True)
class Evaluation:
    """One version's held-out answers: a row a prompt (prompt, completion, version, rewards, its columns)."""

    version: int
    step: int
    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(
    engine: Engine,
    version: AdapterVersion,
    data: PromptDataset,
    reward_funcs: Sequence[RewardFunction],
    config: GRPOConfig,
    scored: Callable[[Callable[[], Any]], Any] = lambda scoring: scoring(),
) -> Evaluation:
    """Means over all held-out prompts, answered greedily; an answer that no function scores has no part in them.
    `scored` calls what calls the reward functions. Columns of booleans split the reward: `reward/COLUMN=true`."""
    prompts, columns = data.select(range(len(data)))
    greedy = Sampling(n=1, max_tokens=config.max_completion_length, temperature=0.0, seed=config.seed)
    groups = engine.generate(prompts, greedy, adapter=version)
    rewards_BF = scored(lambda: score(reward_funcs, groups, columns, config=config))
    rewards_B = weighted_rewards(torch.tensor(rewards_BF, dtype=torch.float64), config.reward_weights).tolist()
    names, rows = reward_names(reward_funcs), []
    for p, (group, rewards, reward) in enumerate(zip(groups, rewards_BF, rewards_B, strict=True)):
        done = group.completions[0]
        row = {"prompt": group.prompt, "completion": done.text, "version": done.version, "reward": reward}
        row |= {f"rewards/{name}": own for name, own in zip(names, rewards, strict=True)}
        rows.append({**row, "columns": {name: values[p] for name, values in columns.items()}})
    return Evaluation(version.number, version.step, _means(rows, names), rows)


def save_evaluation(run_dir: Path, result: Evaluation) -> None:
    path = run_dir / EVALUATIONS / f"{folder_name(result.version)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(result), indent=1, default=str).encode(), sync=False)


def saved_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """What `save_evaluation` wrote, by version. Raises `StoreError` for damage."""
    found = {}
    for path in sorted((run_dir / EVALUATIONS).glob("*.json")):
        try:
            evaluation = Evaluation(**parse_json(read_small(path) or b""))
        except (TypeError, ValueError) as error:
            fix = "delete it, and its version counts as not evaluated"
            raise StoreCorrupt(f"{path} is damaged ({error}): {fix}") from error
        found[evaluation.version] = evaluation
    return found


def _means(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    groups = {name: [row[name] for row in rows] for name in ("reward", *(f"rewards/{name}" for name in names))}
    flags = sorted({key for row in rows for key, value in row["columns"].items() if isinstance(value, bool)})
    for flag, value in product(flags, (True, False)):
        part = [row["reward"] for row in rows if row["columns"].get(flag) is value]
        groups |= {f"reward/{flag}={str(value).lower()}": part} if part else {}
    known = {name: [value for value in values if not math.isnan(value)] for name, values in groups.items()}
    return {name: sum(values) / len(values) if values else math.nan for name, values in known.items()}
