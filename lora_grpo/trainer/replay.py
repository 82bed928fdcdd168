"""Recompute a run's held-out evaluation from its stored versions, in a fresh engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config
from lora_grpo.data import load_data
from lora_grpo.errors import ConfigError
from lora_grpo.metrics import capture_output
from lora_grpo.metrics.quiet import ENGINE_LOG
from lora_grpo.rewards import load_reward
from lora_grpo.trainer.build import effective_grpo
from lora_grpo.trainer.evaluation import evaluate, saved_evaluations
from lora_grpo.trainer.models import build_engine


def run_config(run_dir: Path) -> RunConfig:
    """The settings a run was made with. Raises `ConfigError` for a directory that is no run of `lora-grpo train`."""
    path = run_dir / RESOLVED_FILE
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no {RESOLVED_FILE}: only runs of `lora-grpo train` or `demo` can be replayed")
    return load_config(path)


def evaluate_run(run_dir: str | Path, versions: Sequence[Target] | None = None) -> list[dict[str, Any]]:
    """Held-out metrics of stored versions, sampled again from their bytes; one row a version.

    Default: the first and the last version that the run evaluated. `recorded` is what the run itself measured (None
    where it did not). Raises `ConfigError` or `UnknownVersion`.
    """
    run = Path(run_dir)
    config, saved = run_config(run), saved_evaluations(run)
    wanted: Sequence[Target] = versions or [min(saved), max(saved)]
    _, held_out = load_data(config.data)
    if held_out is None:
        raise ConfigError(f"{run} has no held-out prompts (data.eval)")
    rewards, grpo = [load_reward(reward) for reward in config.rewards], effective_grpo(config)
    held_out = replace(held_out, chat_template_kwargs=grpo.chat_template_kwargs)
    with AdapterStore(archive=run) as store:
        chosen = list(dict.fromkeys(_on_tmpfs(store, target) for target in wanted))
        with capture_output(run / ENGINE_LOG):
            engine = build_engine(config.model, config.engine, config.lora.largest_rank)
        try:
            results = []
            for version in chosen:
                engine.load(version)
                results.append(evaluate(engine, version, held_out, rewards, grpo))
        finally:
            engine.close()
    return [
        {
            "version": result.version,
            "step": result.step,
            "prompts": len(result.rows),
            **result.metrics,
            "recorded": saved[result.version].metrics["reward"] if result.version in saved else None,
        }
        for result in results
    ]


def _on_tmpfs(store: AdapterStore, target: Target) -> AdapterVersion:
    version = store.get(target)
    return version if version.path.is_dir() else store.restore(version)
