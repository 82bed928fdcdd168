"""One engine batch for the rollouts of several trainers, each row under its own trainer's version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from lora_grpo.engines.base import Engine
from lora_grpo.engines.rendering import RenderingEngine
from lora_grpo.engines.requests import sampling_by_prompt
from lora_grpo.errors import EngineError
from lora_grpo.trainer.rollouts import Rollout, Source
from lora_grpo.trainer.run import Run
from lora_grpo.types import Prompt, Sampling


def sample_together(engine: Engine, waiting: Sequence[tuple[Run, Rollout]]) -> None:
    """Complete the prompts of each rollout as its trainer alone would have: same seeds, same settings, same version.

    Raises what the engine raises, for whichever row; what came is for each trainer to check.
    """
    prompts: list[Prompt] = []
    sampling: list[Sampling] = []
    for run, rollout in waiting:
        rollout.version = run.version
        asked, sampled_as = _asked(run.source, rollout)
        prompts += asked
        sampling += sampled_as
    hold(engine, [run for run, _ in waiting])
    versions = [rollout.version for _, rollout in waiting for _ in rollout.prompts]
    groups = iter(engine.generate(prompts, sampling, adapter=versions))
    for _, rollout in waiting:
        made = islice(groups, len(rollout.prompts))
        rollout.groups = [replace(group, prompt=prompt) for group, prompt in zip(made, rollout.prompts, strict=False)]


def hold(engine: Engine, runs: Sequence[Run]) -> None:
    """Have those versions served again whose place the loads of others took. Raises `EngineError` where there are too
    few places."""
    for _ in range(len(runs) + 1):
        loaded = engine.loaded()
        missing = [run for run in runs if run.version not in loaded]
        if not missing:
            return
        missing[0].sync.serve()
    raise EngineError(f"the engine holds {len(engine.loaded())} versions at a time, and {len(runs)} members need one")


def _asked(source: Source, rollout: Rollout) -> tuple[Sequence[Prompt], list[Sampling]]:
    """What the engine is asked for a rollout, as the trainer's own tokenizer renders it."""
    sampling = source.sampling(rollout)
    engine = source.parts.rendering
    if isinstance(engine, RenderingEngine):
        return engine.rendered(rollout.prompts, sampling)
    return rollout.prompts, sampling_by_prompt(sampling, len(rollout.prompts))
