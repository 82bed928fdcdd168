"""Held-out evaluation: greedy answers of a named version, every one of them kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lora_grpo.adapters.files.disk import folder_name, parse_json, read_small, replace_file
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.data import PromptDataset
from lora_grpo.engines.base import Engine
from lora_grpo.errors import StoreCorrupt
from lora_grpo.grpo.advantages import weighted_rewards
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.rewards import RewardFunction, reward_names, score
from lora_grpo.trainer.rollouts import patience
from lora_grpo.types import Sampling

FOLDER = "evaluations"
Rewards: TypeAlias = list[list[float]]


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
    scored: Callable[[Callable[[], Rewards]], Rewards] = lambda scoring: scoring(),
) -> Evaluation:
    """Mean of each reward over all held-out prompts, answered greedily; `reward` is their weighted sum.

    As in training, an answer that no function scores has no reward, and no part in the mean. `scored` calls what calls
    the reward functions. Columns that hold booleans split the reward: `reward/COLUMN=true`, `reward/COLUMN=false`.
    """
    prompts, columns = data.select(range(len(data)))
    greedy = Sampling(n=1, max_tokens=config.max_completion_length, temperature=0.0, seed=config.seed)
    groups = engine.generate(prompts, greedy, adapter=version)
    rewards_BF = scored(lambda: score(reward_funcs, groups, columns, patience=patience(config)))
    rewards_B = weighted_rewards(torch.tensor(rewards_BF, dtype=torch.float64), config.reward_weights).tolist()
    names, rows = reward_names(reward_funcs), []
    for p, (group, rewards, reward) in enumerate(zip(groups, rewards_BF, rewards_B, strict=True)):
        rows.append(
            {
                "prompt": group.prompt,
                "completion": group.completions[0].text,
                "version": group.completions[0].version,
                "reward": reward,
                **{f"rewards/{name}": own for name, own in zip(names, rewards, strict=True)},
                "columns": {name: values[p] for name, values in columns.items()},
            }
        )
    return Evaluation(version.number, version.step, _means(rows, names), rows)


def save_evaluation(run_dir: Path, result: Evaluation) -> Path:
    """Write every row to RUN/evaluations/NUMBER.json, atomically."""
    path = run_dir / FOLDER / f"{folder_name(result.version)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(result), indent=1, default=str).encode(), sync=False)
    return path


def saved_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """What `save_evaluation` wrote, by version. Raises `StoreError` for damage."""
    loaded = [_read(path) for path in sorted((run_dir / FOLDER).glob("*.json"))]
    return {evaluation.version: evaluation for evaluation in loaded}


def evaluations_until(run_dir: Path, step: int) -> list[Evaluation]:
    """The held-out evaluations that a run made up to `step`."""
    saved = saved_evaluations(run_dir)
    return [saved[number] for number in sorted(saved) if saved[number].step <= step]


def _read(path: Path) -> Evaluation:
    try:
        return Evaluation(**parse_json(read_small(path) or b""))
    except (TypeError, ValueError) as error:
        raise StoreCorrupt(
            f"{path} is damaged ({error}): delete it, and its version counts as not evaluated"
        ) from error


def _means(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    metrics = {"reward": _mean([row["reward"] for row in rows])}
    metrics |= {f"rewards/{name}": _mean([row[f"rewards/{name}"] for row in rows]) for name in names}
    flags = sorted({key for row in rows for key, value in row["columns"].items() if isinstance(value, bool)})
    for flag in flags:
        for value in (True, False):
            part = [row["reward"] for row in rows if row["columns"].get(flag) is value]
            if part:
                metrics[f"reward/{flag}={str(value).lower()}"] = _mean(part)
    return metrics


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
