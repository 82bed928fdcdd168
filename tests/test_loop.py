"""The trainer's loop on a fake engine: what it says of a step besides what was learned."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.adapters import disk
from lora_grpo.metrics import read_metrics
from lora_grpo.metrics.render import BACKLOG
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, share_of_low_bytes, tiny_trainer


def test_bytes_on_their_way_to_the_disk_are_shown(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stands still from the second step on: each step's version and state wait, and its metrics say so."""
    disk_goes_on, run = threading.Event(), tmp_path / "run"
    disk_goes_on.set()
    monkeypatch.setattr(disk, "at", lambda point: disk_goes_on.wait() if point.startswith("archive.") else None)
    config = CONFIG.replace(total_steps=4, vllm_importance_sampling_correction=False)

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        if trainer_state.global_step == 2:
            flush()
            disk_goes_on.clear()
        return share_of_low_bytes(completions)

    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config, reward_funcs=reward) as trainer:
        flush = trainer.store.flush

        def mended() -> None:
            disk_goes_on.set()
            flush()

        monkeypatch.setattr(trainer.store, "flush", mended)
        trainer.train()
        waiting = [metrics[BACKLOG] for metrics in trainer.history]
        assert waiting[1] > trainer.sync.adapter_bytes
        assert waiting[3] - waiting[2] == pytest.approx(waiting[2] - waiting[1], rel=0.01)
        assert trainer.store.archive_backlog_bytes == 0
    logged = [record[BACKLOG] for record in read_metrics(run) if record["event"] == "step"]
    assert logged == waiting
