"""Guards: what makes them fire, where they take the run, and when they give up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.config import GuardConfig
from lora_grpo.config_file import load_config
from lora_grpo.errors import ConfigError, TrainingError
from lora_grpo.metrics.log import history, read_metrics
from lora_grpo.metrics.render import GAP
from lora_grpo.trainer.guards import Guard, LogprobGap, NonFinite, ReferenceKL, RewardCollapse, build_guard
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, share_of_low_bytes, tiny_trainer

FAKE = CONFIG.replace(vllm_importance_sampling_correction=False)


def steps(*rewards: float) -> list[dict[str, float]]:
    return [{"reward": reward} for reward in rewards]


def test_a_collapse_needs_every_recent_step_below_the_baseline() -> None:
    collapse = RewardCollapse(drop=0.3, window=3, patience=2)
    assert collapse.why(steps(0.5, 0.6, 0.7, 0.2, 0.3), None) == (
        "reward fell to 0.2, 0.3, 0.3 or more below its mean of 0.6 in the steps before"
    )
    assert collapse.why(steps(0.5, 0.6, 0.7, 0.2, 0.31), None) is None
    assert collapse.why(steps(0.6, 0.7, 0.2, 0.3), None) is None, "the window is not full"
    assert collapse.why(steps(0.5, float("nan"), 0.7, 0.2, 0.3), None) is None, "the baseline is not known"
    assert collapse.why(steps(0.5, 0.6, 0.7, 0.2, float("nan")), None) is None
    # The baseline moves: what counts is the three steps before, not the best ever.
    assert collapse.why(steps(9.0, 0.5, 0.6, 0.7, 0.4, 0.4), None) is None
    assert RewardCollapse(drop=1.0, window=1, patience=1).why(steps(-1.0, -2.5), None) is not None


def test_a_metric_that_a_resumed_run_did_not_have_before_needs_steps_of_its_own() -> None:
    collapse = RewardCollapse(drop=0.3, window=3, patience=2, metric="rewards/new/mean")
    new = [{"reward": 0.5, "rewards/new/mean": value} for value in (0.5, 0.6, 0.7, 0.2, 0.3)]
    assert collapse.why([*steps(0.9, 0.9, 0.9), *new[1:]], None) is None
    assert collapse.why([*steps(0.9, 0.9, 0.9), *new], None) is not None
    with pytest.raises(KeyError, match="rewards/new/mean"):
        collapse.why([*new, *steps(0.9)], None)


def test_gap_and_kl_are_limits_on_the_last_step() -> None:
    assert LogprobGap(0.1).why([{GAP: 0.3}, {GAP: 0.05}], None) is None
    assert "log-prob gap is 0.2 nats per token, above 0.1" in (LogprobGap(0.1).why([{GAP: 0.2}], None) or "")
    assert LogprobGap(0.1).why([{GAP: float("nan")}], None) is None
    assert ReferenceKL(0.5).why([{"kl": 0.6}], None) is not None
    assert ReferenceKL(0.5).why([{"kl": 0.6}], TrainingError("inf")) is None
    assert NonFinite().why([], TrainingError("loss inf")) == "loss inf"


def test_every_reason_is_named_whatever_the_order() -> None:
    guard = Guard(LogprobGap(0.1), ReferenceKL(0.5))
    found = guard.why([{GAP: 0.2, "kl": 0.7}], None)
    assert found is not None
    assert "gap is 0.2" in found
    assert "KL to the reference is 0.7" in found


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RewardCollapse(drop=0.0), r"RewardCollapse.drop=0.0 must be above 0"),
        (lambda: Guard(NonFinite(), learning_rate_factor=1.5), r"learning_rate_factor=1.5 must be in \(0, 1\]"),
        (lambda: Guard(), "at least one policy"),
        (lambda: Guard(ReferenceKL(0.1)).check(CONFIG), "needs beta > 0"),
        (lambda: GuardConfig(reward_dorp=0.1), "did you mean 'reward_drop'"),
    ],
)
def test_what_cannot_work_is_refused(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_settings_make_the_same_guard(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'output_dir = "run"\nmodel.name = "m"\ndata.train = "t.jsonl"\nrewards = [{ name = "exact" }]\n'
        "[guard]\nnon_finite = true\nreward_drop = 0.3\nto = 4\nlearning_rate_factor = 0.5\n"
    )
    built = build_guard(load_config(tmp_path / "run.toml").guard)
    assert built == Guard(NonFinite(), RewardCollapse(0.3), to=4, learning_rate_factor=0.5)
    assert build_guard(GuardConfig()) is None


def collapsing_at(step: int) -> Any:
    """A reward that breaks down for two steps, once."""
    left = [2]

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        rewards = share_of_low_bytes(completions)
        if trainer_state.global_step >= step and left[0]:
            left[0] -= 1
            return [value - 5.0 for value in rewards]
        return rewards

    return reward


def test_a_collapse_takes_the_run_back_and_lowers_the_learning_rate_for_good(llama_dir: Path, tmp_path: Path) -> None:
    guard = Guard(RewardCollapse(drop=2.0, window=3, patience=2), to=3, learning_rate_factor=0.5)
    settings = {"guard": guard, "reward_funcs": collapsing_at(5)}
    plain = FAKE.replace(lr_scheduler_type="linear", total_steps=8)
    run = tmp_path / "run"
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, plain, **settings) as trainer:
        trainer.train()
        assert trainer.rollbacks == 1
        assert trainer.store.get(8).parent == 3
        rates = {metrics["step"]: metrics["learning_rate"] for metrics in trainer.history}
        # Two updates a step, of 16 in all: the mean of a step's two rates, halved from step 3 on.
        for step, rate in rates.items():
            scale = 0.5 if step >= 3 else 1.0
            assert rate == pytest.approx(scale * 2e-3 * (1 - (2 * (step - 1) + 0.5) / 16))
        blamed = trainer.store.metrics(7)["guard"]
        assert blamed.startswith("reward fell to -")
        assert trainer.rollback_log.reasons == [blamed]
        trainer.rollback(to=2)
        halved = trainer.policy.optimizer.param_groups[0]["lr"]
        assert halved == pytest.approx(0.5 * 2e-3 * (1 - 2 / 16))
    records = read_metrics(run)
    said = [record["text"] for record in records if record["event"] == "rollback"]
    assert len(said) == 1
    assert said[0].startswith("guard: reward fell to ")
    assert "rolled back from v7 to v3" in said[0]
    assert "learning rate at 0.5 times" in said[0]
    assert [record["step"] for record in history(records) if record["event"] == "step"] == list(range(1, 9))
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, plain, **settings) as trainer:
        trainer.resume()
        assert trainer.policy.optimizer.param_groups[0]["lr"] == pytest.approx(halved)
        trainer.rollback(to=1)
        assert trainer.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 2e-3)


def poisoned_from(step: int, trainers: list[Any], times: int) -> Any:
    """A reward that spoils one weight of its trainer, `times` times: the step's loss is then not finite."""
    left = [times]

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        if trainer_state.global_step >= step and left[0]:
            left[0] -= 1
            with torch.no_grad():
                next(iter(trainers[0].policy.parameters.values()))[0, 0] = float("inf")
        return share_of_low_bytes(completions)

    return reward


def test_a_poisoned_weight_is_undone_and_training_goes_on(llama_dir: Path, tmp_path: Path) -> None:
    trainers: list[Any] = []
    settings = {"guard": Guard(NonFinite(), to="parent"), "reward_funcs": poisoned_from(3, trainers, times=1)}
    config = FAKE.replace(total_steps=4)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", config, **settings) as trainer:
        trainers.append(trainer)
        trainer.train()
        assert trainer.steps_done == 4
        assert trainer.rollback_log.entries[0].left == 3
        assert trainer.store.get(4).parent == 2
        assert all(parameter.isfinite().all() for parameter in trainer.policy.parameters.values())


def test_it_gives_up_after_its_rollbacks_naming_every_reason(llama_dir: Path, tmp_path: Path) -> None:
    trainers: list[Any] = []
    guard = Guard(NonFinite(), to=2, max_rollbacks=2)
    settings = {"guard": guard, "reward_funcs": poisoned_from(3, trainers, times=9)}
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", FAKE, **settings) as trainer:
        trainers.append(trainer)
        with pytest.raises(TrainingError, match=r"rolled back 2 times and would do it again: \(1\) .*; \(3\) ") as met:
            trainer.train()
        assert str(met.value).count("loss") >= 3
        assert trainer.rollbacks == 2


def test_without_a_guard_and_without_anywhere_to_go_the_error_stands(llama_dir: Path, tmp_path: Path) -> None:
    for guard, words in ((None, "not taken|non-finite"), (Guard(NonFinite()), "no version to go back to")):
        trainers: list[Any] = []
        settings = {"guard": guard, "reward_funcs": poisoned_from(1, trainers, times=1)}
        with tiny_trainer(
            llama_dir, fake_engine(llama_dir), tmp_path / str(guard is None), FAKE, **settings
        ) as trainer:
            trainers.append(trainer)
            with pytest.raises(TrainingError, match=words):
                trainer.train()
            assert trainer.version.number == 1


def test_its_baseline_survives_a_stop(llama_dir: Path, tmp_path: Path) -> None:
    """Three steps before the stop and two that collapse after it: what a run in one piece goes back for."""
    settings = {"guard": Guard(RewardCollapse(drop=2.0, window=3, patience=2), to=3), "reward_funcs": collapsing_at(4)}
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    with tiny_trainer(llama_dir, engine, run, FAKE.replace(total_steps=3), **settings) as trainer:
        trainer.train()
    with tiny_trainer(llama_dir, engine, run, FAKE.replace(total_steps=6), **settings) as trainer:
        trainer.resume()
        trainer.train()
        assert [(entry.left, entry.to) for entry in trainer.rollback_log.entries] == [(6, 3)]
        assert trainer.rollback_log.reasons[0].startswith("reward fell to -")
