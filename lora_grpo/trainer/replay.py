"""Stored versions of a run in a fresh engine, whoever holds the run: its held-out evaluation is recomputed so."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.layout import PEFT_FILES
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config
from lora_grpo.data import load_data
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.metrics import capture_output
from lora_grpo.metrics.quiet import ENGINE_LOG
from lora_grpo.rewards import load_reward
from lora_grpo.trainer.build import effective_grpo
from lora_grpo.trainer.evaluation import evaluate, saved_evaluations
from lora_grpo.trainer.models import build_engine

Borrow: TypeAlias = Callable[[Target], AdapterVersion]


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
    results = []
    with borrowing(run) as borrow:
        chosen = list(dict.fromkeys(borrow(target) for target in wanted))
        with replaying(run, config) as engine:
            for version in chosen:
                engine.load(version)
                results.append(evaluate(engine, version, held_out, rewards, grpo))
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


@contextmanager
def borrowing(run: Path) -> Iterator[Borrow]:
    """Copies versions into a folder of their own on tmpfs, so that it does not matter what becomes of the run's."""
    shared = Path("/dev/shm")
    with (
        AdapterStore(archive=run, readonly=True) as store,
        tempfile.TemporaryDirectory(prefix="lora-grpo-replay-", dir=shared if shared.is_dir() else None) as place,
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

        yield borrow


@contextmanager
def replaying(run: Path, config: RunConfig) -> Iterator[Engine]:
    """An engine of its own for a stored run, closed at the end; what it says meanwhile is in `RUN/engine.log`."""
    with capture_output(run / ENGINE_LOG):
        engine = build_engine(config.model, config.engine, config.lora.largest_rank)
    try:
        yield engine
    finally:
        engine.close()
