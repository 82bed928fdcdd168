"""The trainer's loop on a fake engine: what it says of a step besides what was learned."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoConfig

from lora_grpo.adapters.upkeep.archive import Archive
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import read_metrics
from lora_grpo.metrics.render import BACKLOG
from lora_grpo.trainer import GRPOTrainer
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, same, share_of_low_bytes, tiny_trainer, weights

FAKE = CONFIG.replace(vllm_importance_sampling_correction=False)


def test_bytes_on_their_way_to_the_disk_are_shown(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stands still from the second step on: each step's version and state wait, and its metrics say so."""
    disk_goes_on, run = threading.Event(), tmp_path / "run"
    disk_goes_on.set()
    keep = Archive.keep_version
    monkeypatch.setattr(Archive, "keep_version", lambda *given: (disk_goes_on.wait(), keep(*given)))
    config = FAKE.replace(total_steps=4)

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


def test_what_rewards_log_of_completions_stands_beside_them(llama_dir: Path, tmp_path: Path) -> None:
    """And nothing takes the place of what a sample is: its prompt, completion, reward and version."""

    def reward(completions: Sequence[str], log_extra: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_extra("odd", [{object()} for _ in completions])
        log_extra("reward", ["taken"] * len(completions))
        return share_of_low_bytes(completions)

    config = FAKE.replace(total_steps=1, log_completions_every=1)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", config, reward_funcs=reward) as trainer:
        trainer.train()
    (samples,) = read_metrics(tmp_path / "run" / "samples.jsonl")
    assert len(samples["rows"]) == 4
    for row in samples["rows"]:
        assert list(row) == ["prompt", "completion", "reward", "version", "length", "odd"]
        assert row["length"] == len(row["completion"])
        assert row["reward"] == pytest.approx(share_of_low_bytes([row["completion"]])[0])


def test_a_held_out_answer_that_nothing_scores_has_no_part_in_the_mean(llama_dir: Path, tmp_path: Path) -> None:
    """As in training, and not as if it had earned 0."""

    def reward(completions: Sequence[str], scored: Sequence[bool]) -> list[float | None]:
        return [2.0 if one else None for one in scored]

    rows = [{"prompt": row["prompt"], "scored": index % 2 == 0} for index, row in enumerate(ROWS)]
    config, given = FAKE.replace(total_steps=1), {"reward_funcs": reward, "train_dataset": rows, "eval_dataset": rows}
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", config, **given) as trainer:
        trainer.train()
        for found in trainer.evaluations:
            nothing = found.metrics.pop("reward/scored=false")
            assert math.isnan(nothing)
            assert found.metrics == {"reward": 2.0, "rewards/reward": 2.0, "reward/scored=true": 2.0}


def rare(first: int) -> Any:
    """A reward that is 0 until step `first`."""

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        return share_of_low_bytes(completions) if trainer_state.global_step >= first else [0.0] * len(completions)

    return reward


def said(run: Path) -> list[str]:
    return [record["text"] for record in read_metrics(run) if record["event"] == "message"]


def test_a_reward_that_comes_late_is_waited_for(
    llama_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twelve steps without a signal ended the run for good, after ten of them."""
    run, config = tmp_path / "run", FAKE.replace(total_steps=14)
    settings = {"reward_funcs": rare(13), "view": True}
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config, **settings) as trainer:
        before = weights(trainer)
        trainer.train()
        assert trainer.steps_done == 14
        assert not same(weights(trainer), before)
    (warning,) = [text for text in said(run) if text.startswith("warning")]
    assert warning.startswith("warning: in the last 10 steps every group's rewards were equal, so nothing was learned")
    assert "num_generations" in warning
    assert "max_steps_without_signal" in warning
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert ["signal 0%" in line for line in lines] == [True] * 12 + [False] * 2
    assert f"signal {100 * trainer.history[-1]['frac_groups_used']:.3g}%" in lines[-1]


def test_a_setting_ends_a_run_that_learns_nothing_and_resuming_goes_on(llama_dir: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", FAKE.replace(total_steps=7, max_steps_without_signal=3)
    settings = {"reward_funcs": rare(6)}
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config, **settings) as trainer:
        trainer.train()
        assert trainer.steps_done == 3
    assert "max_steps_without_signal ends the run here; raise it and resume" in said(run)[-1]
    more = config.replace(max_steps_without_signal=6)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, more, **settings) as trainer:
        trainer.resume()
        trainer.train()
        assert trainer.steps_done == 7


def test_a_pad_token_beyond_the_embedding(llama_dir: Path, tmp_path: Path) -> None:
    """As after `add_special_tokens` without a resized model: what is masked needs no row there."""
    engine = fake_engine(llama_dir)
    rows = AutoConfig.from_pretrained(llama_dir).vocab_size
    engine.tokenizer.add_tokens([f"<new {index}>" for index in range(rows)])
    engine.tokenizer.pad_token = f"<new {rows - 1}>"
    assert engine.tokenizer.pad_token_id >= rows
    config = FAKE.replace(total_steps=1)
    with tiny_trainer(llama_dir, engine, tmp_path / "run", config, processing_class=engine.tokenizer) as trainer:
        trainer.train()
        assert trainer.steps_done == 1


@pytest.mark.parametrize("fault", ["tracker", "file", "target"])
def test_what_is_wrong_is_told_before_the_engine_starts(
    fault: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a traceback after minutes of starting; PEFT leaves out a name that is not there, if another one is."""
    monkeypatch.setattr("lora_grpo.trainer.room.build_engine", None)
    (tmp_path / "file").touch()
    run, targets, config, words = {
        "tracker": ("run", ["q_proj"], FAKE.replace(report_to=("tensorbord",)), "did you mean 'tensorboard'"),
        "file": ("file", ["q_proj"], FAKE, "file is a file; choose another"),
        "target": ("run", ["k_proj", "qproj"], FAKE, r"has no layer 'qproj'; did you mean 'q_proj'\?"),
    }[fault]
    with pytest.raises(ConfigError, match=words):
        GRPOTrainer(
            str(llama_dir),
            share_of_low_bytes,
            config,
            ROWS,
            peft_config=LoraConfig(r=8, target_modules=targets),
            run_dir=tmp_path / run,
            view=False,
        )
