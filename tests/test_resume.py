"""A run that was killed and resumed is the run that was not."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_grpo.adapters.asking.requests import request
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.archive import Archive
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog, roll_back_stopped
from lora_grpo.config import KeepConfig
from lora_grpo.errors import ConfigError, StoreCorrupt, StoreLocked
from lora_grpo.metrics.log import history, read_metrics
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.reference import keep_reference, kept_reference
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import loop
from lora_grpo.trainer.run import roll_back
from tests.tiny_models import load_model, tiny_lora
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, moments, same, share_of_low_bytes, tiny_trainer, weights

STEPS = 6


def run_tiny(base: Path, folder: Path, root: Path, **plan: Any) -> subprocess.Popen[str]:
    plan = {"engine": "fake", "steps": STEPS, **plan}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tiny_run", str(base), str(folder), str(root), json.dumps(plan)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def whole(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """A run of so many steps by the fake engine that nothing stopped; made once."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-test-") as root:

        @functools.cache
        def of(steps: int) -> Path:
            run = tmp_path_factory.mktemp("whole") / "run"
            finished(run_tiny(llama_dir, run, Path(root) / str(steps), steps=steps))
            return run

        yield of


def killed(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err


def state_at(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """The trainer's state in the archive of the last version published at `step`: weights, moments, random state."""
    with AdapterStore(archive=folder, readonly=True) as store:
        number = max(version.number for version in store.list() if version.step == step)
        files = store.load_state(number)
    assert files is not None
    return load_file(files["state.safetensors"]), json.loads(files["state.json"].read_text())


@pytest.mark.vllm
def test_killed_in_a_step_and_resumed_on_real_vllm(llama_dir: Path, tmp_path: Path, shm_dir: Path) -> None:
    whole = run_tiny(llama_dir, tmp_path / "whole", shm_dir / "whole", engine="vllm")
    result = finished(whole)
    killed(run_tiny(llama_dir, tmp_path / "killed", shm_dir / "killed", engine="vllm", die_in_step=4))
    resumed = finished(run_tiny(llama_dir, tmp_path / "killed", shm_dir / "killed", engine="vllm", resume=True))
    assert (resumed["steps"], resumed["rollbacks"]) == (result["steps"], 0) == (STEPS, 0)
    for step in range(1, STEPS + 1):
        ours, theirs = state_at(tmp_path / "killed", step), state_at(tmp_path / "whole", step)
        assert same(ours[0], theirs[0]), f"step {step}"
        assert ours[1] == theirs[1], f"step {step}"
    steps = [record for record in history(read_metrics(tmp_path / "killed")) if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("reboot", [False, True])
def test_killed_between_promotion_and_archive(
    llama_dir: Path, tmp_path: Path, shm_dir: Path, whole: Callable[[int], Path], reboot: bool
) -> None:
    """What was not archived is lost with the tmpfs only, and the next start says which."""
    killed(run_tiny(llama_dir, tmp_path / "killed", shm_dir / "killed", die_at=["archive.copied", 3]))
    with AdapterStore(archive=tmp_path / "killed", readonly=True) as store:
        head = store.head
        assert head is not None
        assert store.where(3) == {"tmpfs"}
        published = max(store.numbers)
    if reboot:
        shutil.rmtree(shm_dir / "killed")
    finished(run_tiny(llama_dir, tmp_path / "killed", shm_dir / "killed", resume=True))
    assert same(state_at(tmp_path / "killed", STEPS)[0], state_at(whole(STEPS), STEPS)[0])
    said = " | ".join(record["text"] for record in read_metrics(tmp_path / "killed") if record["event"] == "message")
    with AdapterStore(archive=tmp_path / "killed", readonly=True) as store:
        numbers = store.numbers
        assert len(numbers) == len(set(numbers))
        for number in numbers:
            store.verify(number)
        assert (3 in numbers) is not reboot
    assert max(numbers) > published
    assert ("lost before they reached the archive: versions 3" in said) is reboot
    assert ("brought to the archive now: versions 3" in said) is not reboot


def test_a_second_process_is_told_who_holds_the_run(llama_dir: Path, tmp_path: Path, shm_dir: Path) -> None:
    run = tmp_path / "run"
    holding = run_tiny(llama_dir, run, shm_dir / "run", pause=True)
    try:
        assert holding.stdout is not None
        assert holding.stdout.readline() == "step 1\n"
        with pytest.raises(StoreLocked, match=rf"{run} is open in process {holding.pid} on "):
            tiny_trainer(llama_dir, fake_engine(llama_dir), run)
    finally:
        holding.kill()
        holding.communicate()


def config(steps: int = STEPS) -> Any:
    return CONFIG.replace(total_steps=steps, vllm_importance_sampling_correction=False)


def test_a_rollback_made_while_stopped_is_taken_up(llama_dir: Path, tmp_path: Path, shm_dir: Path) -> None:
    """The same as rolling back in the running trainer: state of v3, prompts not rewound, other seeds, parent 3."""
    engine = fake_engine(llama_dir)
    stopped, live = tmp_path / "stopped", tmp_path / "live"
    with tiny_trainer(llama_dir, engine, stopped, config(4)) as trainer:
        trainer.train()
        position = trainer.source.sampler.state_dict()
    with AdapterStore(archive=stopped) as store:
        assert roll_back_stopped(store, 4).to == 4
        assert roll_back_stopped(store, "parent").to == 3
    with tiny_trainer(llama_dir, engine, stopped, config(4)) as trainer:
        report = trainer.resume()
        assert report is not None
        assert (report.version.number, report.weights, trainer.steps_done, trainer.rollbacks) == (3, "exact", 2, 2)
        assert trainer.source.sampler.state_dict() == position
        trainer.train()
        assert trainer.store.get(6).parent == 3
    with tiny_trainer(llama_dir, engine, live, config(4)) as trainer:
        trainer.train()
        trainer.rollback(4)
        trainer.rollback("parent")
        trainer.train()
    assert same(state_at(stopped, 4)[0], state_at(live, 4)[0])


def test_the_best_version_stays_exact_when_it_was_sampled_from_again(llama_dir: Path, tmp_path: Path) -> None:
    """What it earned first is what it was chosen by, and what its trainer state is kept for."""
    engine, run, keep = fake_engine(llama_dir), tmp_path / "run", KeepConfig(trainer_states=1)
    luck = iter([0.1, 0.2, 0.9, 0.3, *[0.1] * 99])

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        value = next(luck)
        return [value + 0.01 * row for row in range(len(completions))]

    settings: dict[str, Any] = {"reward_funcs": reward, "keep": keep}
    with tiny_trainer(llama_dir, engine, run, config(4), **settings) as trainer:
        trainer.train()
        assert trainer.store.get("best").number == 3
        earned = trainer.store.metrics(3)["reward"]
    for steps in (6, 8):
        with AdapterStore(archive=run) as store:
            roll_back_stopped(store, "best")
        with tiny_trainer(llama_dir, engine, run, config(steps), **settings) as trainer:
            trainer.resume()
            assert trainer.version.number == 3
            trainer.train()
            assert trainer.store.metrics(3)["reward"] == earned
            assert "state" in trainer.store.where(3)


def test_the_best_versions_state_is_kept_also_on_a_slow_disk(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reward is known when the next version is published, and the queue is pruned by it."""
    keep_state = Archive.keep_state

    def slowly(*arguments: Any) -> None:
        time.sleep(1.0)
        keep_state(*arguments)

    monkeypatch.setattr(Archive, "keep_state", slowly)
    luck = iter([0.1, 0.9, 0.3, 0.2])

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        value = next(luck)
        return [value + 0.01 * row for row in range(len(completions))]

    settings: dict[str, Any] = {"reward_funcs": reward, "keep": KeepConfig(trainer_states=1)}
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", config(4), **settings) as trainer:
        trainer.train()
        best = trainer.store.get("best").number
        assert best == 2
        assert "state" in trainer.store.where(best)


def test_a_rollback_without_state_is_completed_rounded(llama_dir: Path, tmp_path: Path) -> None:
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    with tiny_trainer(llama_dir, engine, run, config(4)) as trainer:
        trainer.train()
        schedule = trainer.policy.scheduler.state_dict()
    shutil.rmtree(run / "states" / "000003")
    with AdapterStore(archive=run) as store:
        roll_back_stopped(store, 3)
    with tiny_trainer(llama_dir, engine, run, config(4)) as trainer:
        report = trainer.resume()
        assert report is not None
        assert (report.version.number, report.weights, report.optimizer) == (3, "rounded", "reset")
        assert trainer.policy.scheduler.state_dict() == schedule
        assert moments(trainer) == []
        assert trainer.steps_done == 2


def test_killed_in_the_middle_of_a_rollback_is_as_if_it_was_not_asked(llama_dir: Path, tmp_path: Path) -> None:
    """The intention is written before HEAD moves; a kill in between must not change seeds or prompts."""
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    with tiny_trainer(llama_dir, engine, run, config(3)) as trainer:
        trainer.train()
        last = weights(trainer)
        trainer.rollback(2)
        lines = (run / "rollbacks.jsonl").read_bytes()
        trainer.rollback(4)
    with AdapterStore(archive=run) as store:
        store.promote(4)
    (run / "rollbacks.jsonl").write_bytes(lines)
    with tiny_trainer(llama_dir, engine, run, config(3)) as trainer:
        trainer.resume()
        assert trainer.rollbacks == 0
        assert trainer.version.number == 4
        assert same(weights(trainer), last)
    assert len(RollbackLog(run)) == 0


@pytest.mark.parametrize("reboot", [False, True])
def test_killed_before_its_first_state_was_written(
    llama_dir: Path, tmp_path: Path, shm_dir: Path, whole: Callable[[int], Path], reboot: bool
) -> None:
    """It begins again as a run that was not killed begins: same rows in the same batches, by the same seed."""
    killed(run_tiny(llama_dir, tmp_path / "killed", shm_dir / "killed", die_at=["promote.renamed", 1]))
    with AdapterStore(archive=tmp_path / "killed", readonly=True) as store:
        assert (store.numbers, store.states) == ([1], [])
    if reboot:
        shutil.rmtree(shm_dir / "killed")
    result = finished(run_tiny(llama_dir, tmp_path / "killed", shm_dir / "killed", resume=True, steps=2))
    assert result["steps"] == 2
    for step in (1, 2):
        ours, theirs = state_at(tmp_path / "killed", step), state_at(whole(2), step)
        for _, known in (ours, theirs):  # a number that was lost with the tmpfs is not given out again
            known["extra"]["measured"].pop("version")
        assert same(ours[0], theirs[0]), f"step {step}"
        assert ours[1] == theirs[1], f"step {step}"


def test_back_to_the_first_version_without_its_state(llama_dir: Path, tmp_path: Path) -> None:
    """Its weights are the ones that every start makes: exact and seeded, while prompts and learning rate go on."""
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    with tiny_trainer(llama_dir, engine, run, config(3)) as trainer:
        first = weights(trainer)
        trainer.train()
        position = trainer.source.sampler.state_dict()
        roll_back(trainer, 2, learning_rate_factor=0.5)
    shutil.rmtree(run / "states" / "000001")
    with AdapterStore(archive=run) as store:
        roll_back_stopped(store, 1)
    with tiny_trainer(llama_dir, engine, run, config(3)) as trainer:
        torch.manual_seed(99)
        report = trainer.resume()
        assert report is not None
        assert (report.version.number, report.weights, report.random_state) == (1, "exact", "reset")
        assert same(weights(trainer), first)
        assert torch.initial_seed() == CONFIG.seed
        assert trainer.source.sampler.state_dict() == position
        assert trainer.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * CONFIG.learning_rate)
        assert (trainer.steps_done, trainer.rollbacks) == (0, 2)


def test_what_was_measured_is_known_after_a_resume(llama_dir: Path, tmp_path: Path) -> None:
    """The steps that count, without what a rollback undid; a guard compares the next ones with them."""
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    with tiny_trainer(llama_dir, engine, run, config(4)) as trainer:
        trainer.train()
        steps = trainer.history
    with tiny_trainer(llama_dir, engine, run, config(5)) as trainer:
        trainer.resume()
        assert [list(metrics) for metrics in trainer.history] == [list(metrics) for metrics in steps]
        for ours, theirs in zip(trainer.history, steps, strict=True):
            assert ours == pytest.approx(theirs, nan_ok=True)
        trainer.train()
        trainer.rollback(2)
    with tiny_trainer(llama_dir, engine, run, config(5)) as trainer:
        trainer.resume()
        assert [metrics["step"] for metrics in trainer.history] == [1]


@pytest.mark.parametrize(
    ("room", "last_words", "call"),
    [(Reporter, "step", 3), (Reporter, "step", 4), (loop, "held_out", 2), (loop, "held_out", 3)],
)
def test_what_a_step_owed_when_it_was_killed_after_publishing_is_made_good(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: Any, last_words: str, call: int
) -> None:
    """Its metrics, what they say of the version it sampled from, and the evaluation due there, once each."""
    settings: dict[str, Any] = {"config": config(4).replace(eval_every=2), "eval_dataset": ROWS[:2]}
    calls, said = [], getattr(room, last_words)

    def stopped(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        said(*arguments)

    def known(run: Path) -> list[dict[str, Any]]:
        timed = ("time", "sync/", "step_time", "archive/")
        kept = [record for record in history(read_metrics(run)) if record["event"] in {"step", "evaluation"}]
        return [{name: value for name, value in record.items() if not name.startswith(timed)} for record in kept]

    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "whole", **settings) as whole:
        result = whole.train()
        with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", **settings) as trainer:
            monkeypatch.setattr(room, last_words, stopped)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", **settings) as trainer:
            trainer.resume()
            again = trainer.train()
            recorded = {version.number: whole.store.metrics(version) for version in whole.store.list()}
            assert recorded == {version.number: trainer.store.metrics(version) for version in trainer.store.list()}
            assert [metrics["step"] for metrics in trainer.history] == [1, 2, 3, 4]
    assert again["reward_after"] == result["reward_after"] is not None
    assert known(tmp_path / "run") == known(tmp_path / "whole")


@pytest.mark.parametrize("rolled_back", [False, True])
def test_versions_between_a_state_and_head_may_be_gone(llama_dir: Path, tmp_path: Path, rolled_back: bool) -> None:
    """Retention leaves gaps in the line of ancestors: it is followed across them, for the state or the schedule."""
    keep = KeepConfig(on_tmpfs=2, archived=2, trainer_states=2, trainer_state_every=10)
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    schedules: dict[int, Any] = {}

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        schedules[trainer_state.global_step - 1] = trainer.policy.scheduler.state_dict()
        return share_of_low_bytes(completions)

    with tiny_trainer(llama_dir, engine, run, config(18), keep=keep, reward_funcs=reward) as trainer:
        trainer.train()
    with AdapterStore(archive=run) as store:
        assert store.states == [1, 11]
        assert set(range(12, 19)) - set(store.numbers)
        if rolled_back:
            roll_back_stopped(store, 18)
    with tiny_trainer(llama_dir, engine, run, config(18), keep=keep, reward_funcs=reward) as trainer:
        report = trainer.resume()
        assert report is not None
        expected = (18, "rounded", 17) if rolled_back else (11, "exact", 10)
        assert (report.version.number, report.weights, trainer.steps_done) == expected
        assert trainer.policy.scheduler.state_dict() == schedules[10]
        trainer.train()
        assert trainer.store.get(20).parent == expected[0]


def test_without_any_state_there_is_nothing_to_resume_exactly(llama_dir: Path, tmp_path: Path) -> None:
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    with tiny_trainer(llama_dir, engine, run, config(2)) as trainer:
        trainer.train()
    shutil.rmtree(run / "states")
    with (
        tiny_trainer(llama_dir, engine, run, config(2)) as trainer,
        pytest.raises(ConfigError, match="rounded weights"),
    ):
        trainer.resume()
    with AdapterStore(archive=run) as store:
        assert roll_back_stopped(store, "head").to == 3
    with tiny_trainer(llama_dir, engine, run, config(2)) as trainer:
        report = trainer.resume()
        assert report is not None
        assert report.weights == "rounded"


def test_a_live_run_that_is_asked_to_go_where_it_is_goes_on_unchanged(llama_dir: Path, tmp_path: Path) -> None:
    run, asked = tmp_path / "run", []

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        if not asked:
            asked.append(request(run, "rollback", to="2"))
        return share_of_low_bytes(completions)

    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config(2), reward_funcs=reward) as trainer:
        assert trainer.train()["rollbacks"] == 0
    answer = asked[0].answered()
    assert answer is not None
    assert answer["done"] == "v2 is HEAD already: nothing has changed"
    assert (answer["left"], answer["version"], answer["weights"]) == (2, 2, "exact")
    assert not RollbackLog(run).entries
    assert "rollback" not in {record["event"] for record in read_metrics(run)}


def test_the_reference_of_the_kl_stays_over_rollback_and_resume(llama_dir: Path, tmp_path: Path) -> None:
    """It is the trained adapter that the run began from, also where the trainer that resumes is given a later one."""
    engine, run, kl = fake_engine(llama_dir), tmp_path / "run", config(2).replace(beta=0.1, generation_batch_size=8)
    with tiny_trainer(llama_dir, engine, run, kl) as trainer:
        trainer.train()
        assert trainer.history[0]["kl"] == 0.0
        assert trainer.history[1]["kl"] > 0.0
        began = trainer.policy.reference._weights
        trainer.rollback(to=1)
        assert same(trainer.policy.reference._weights, began)
    with tiny_trainer(llama_dir, engine, run, kl) as trainer:
        with torch.no_grad():
            for parameter in trainer.policy.parameters.values():
                parameter.mul_(3.0)
        trainer.policy.reference.set(trainer.policy.reference.weights_now())
        assert not same(trainer.policy.reference._weights, began)
        trainer.resume()
        assert same(trainer.policy.reference._weights, began)
    (run / "reference.safetensors").unlink()
    with (
        tiny_trainer(llama_dir, engine, run, kl) as trainer,
        pytest.raises(StoreCorrupt, match=r"reference\.safetensors is gone, .* copy it back, or set beta=0"),
    ):
        trainer.resume()
    keep_reference(run, None)
    assert kept_reference(run) is None


def test_a_run_of_a_users_own_loop_is_gone_on_with(llama_dir: Path, tmp_path: Path) -> None:
    """What that loop kept beside its state says nothing of our data or counts, which begin anew."""
    engine, run = fake_engine(llama_dir), tmp_path / "run"
    model = tiny_lora(load_model(llama_dir), r=8, scale=0.02)
    with AdapterStore(archive=run) as store:
        sync = NativeSync(model, engine, store)
        sync.push(step=0, extra={"mine": 1})
        sync.close()
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run) as trainer:
        report = trainer.resume()
        assert report is not None
        assert (report.version.number, trainer.steps_done, trainer.without_signal) == (1, 0, 0)
