"""What is refused leaves the run as it was; what is stopped can go on; a copy is a run of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped
from lora_grpo.cli import app
from lora_grpo.config import DataConfig, LoraSettings, ModelConfig, RewardConfig, RunConfig
from lora_grpo.config_file import load_config, save_config
from lora_grpo.errors import ConfigError, LoraGrpoError, TrainingError
from lora_grpo.metrics.log import read_metrics
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import build, build_trainer
from lora_grpo.trainer.room import plan_room
from tests.store_files import adapter
from tests.tiny_models import load_model, tiny_lora
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, tiny_trainer

STEPS = CONFIG.replace(total_steps=2, vllm_importance_sampling_correction=False)


@pytest.fixture
def settings(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Settings of a run that is trained with the fake engine."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def trainer(*_: Any, run_dir: str, guard: Any, **__: Any) -> Any:
        return tiny_trainer(llama_dir, fake_engine(llama_dir), Path(run_dir), STEPS)

    monkeypatch.setattr(build, "GRPOTrainer", trainer)
    return RunConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(name=str(llama_dir)),
        data=DataConfig(train=str(tmp_path / "prompts.jsonl")),
        rewards=(RewardConfig(name="tests.tiny_trainer:share_of_low_bytes"),),
        lora=LoraSettings(r=8),
        grpo=STEPS,
    )


def kept(run: Path) -> dict[str, bytes]:
    """What of a run has to survive: settings, the adapter's form, history, versions and states."""
    names = ("config.json", "adapter.json", "rollbacks.jsonl", "versions/*/*", "states/*/*")
    return {str(path.relative_to(run)): path.read_bytes() for name in names for path in run.glob(name)}


TYPO = (RewardConfig(name="tests.tiny_trainer:share_of_low_bites"),)


def test_a_typo_does_not_block_the_corrected_command(settings: RunConfig) -> None:
    run = Path(settings.output_dir)
    with pytest.raises(ConfigError, match="share_of_low_bites"):
        build_trainer(settings.replace(rewards=TYPO))
    assert not run.exists()
    with build_trainer(settings) as trainer:
        assert load_config(run) == settings
        trainer.train()


def test_a_start_that_failed_does_not_block_the_corrected_command(
    settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is there by then, and the settings may be; nothing was published."""
    with build_trainer(settings) as trainer, monkeypatch.context() as broken:
        broken.setattr(AdapterStore, "publish", lambda *_, **__: (_ for _ in ()).throw(TrainingError("no")))
        with pytest.raises(TrainingError):
            trainer.train()
    with build_trainer(settings) as trainer:
        trainer.train()
    with pytest.raises(ConfigError, match="holds a run already"):
        build_trainer(settings)


def test_on_cuda_micro_batches_are_cut_by_tokens_found_at_the_first_start(
    settings: RunConfig, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And kept by resume, from whatever settings: bits depend on the cut."""

    def trainer(model: Any, *, config: Any, run_dir: str, **__: Any) -> Any:
        return tiny_trainer(llama_dir, fake_engine(llama_dir), Path(run_dir), config)

    def planned(model: Any, members: Any, *others: Any, **settings: Any) -> Any:
        counted.append(members[0].batch.rows)
        return plan_room(model, members, *others, **settings)

    counted: list[int] = []
    monkeypatch.setattr(build, "GRPOTrainer", trainer)
    monkeypatch.setattr("lora_grpo.trainer.assembly.plan_room", planned)
    with monkeypatch.context() as gpu:
        gpu.setattr("lora_grpo.trainer.assembly.default_device", lambda: torch.device("cuda"))
        with build_trainer(settings) as trained:
            trained.train()
    found = load_config(settings.output_dir).grpo.max_tokens_per_micro_batch
    assert found is not None
    rows = settings.grpo.per_device_train_batch_size
    assert found % rows == 0
    assert found > rows * settings.grpo.max_completion_length
    with build_trainer(settings, resume=True) as trained:
        assert trained.policy.config.max_tokens_per_micro_batch == found
    assert load_config(settings.output_dir).grpo.max_tokens_per_micro_batch == found
    other = settings.replace(grpo=settings.grpo.replace(max_tokens_per_micro_batch=7))
    with build_trainer(other, resume=True) as trained:
        assert trained.policy.config.max_tokens_per_micro_batch == 7
    assert counted == [rows, rows, 1]  # what memory is planned for


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": LoraSettings(r=16)}, r"lora\.r=16: the versions of .*run were trained with 8"),
        ({"rewards": TYPO}, "share_of_low_bites"),
        ({"data": DataConfig(train="nowhere.jsonl")}, r"nowhere\.jsonl"),
        ({"output_dir": "itself"}, "refused at the very end"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(
    settings: RunConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    run = Path(settings.output_dir)
    with build_trainer(settings) as trainer:
        trainer.train()
    before = kept(run)
    if "output_dir" in change:
        change = {"grpo": STEPS.replace(seed=4)}
        monkeypatch.setattr("lora_grpo.trainer.GRPOTrainer.resume", lambda _: (_ for _ in ()).throw(ConfigError(words)))
    with pytest.raises(ConfigError, match=words):
        build_trainer(settings.replace(**change), resume=True)
    assert kept(run) == before
    monkeypatch.undo()


def test_a_resume_with_nothing_left_says_so_and_starts_nothing(
    settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(settings.output_dir)
    with build_trainer(settings) as trainer:
        result = trainer.train()

    def resumed(*overrides: str) -> Any:
        return CliRunner().invoke(app, ["train", str(run), "--resume", *overrides], env={"NO_COLOR": "1"})

    def starts(*_: Any, **__: Any) -> Any:
        raise TrainingError("it starts")

    monkeypatch.setattr(build, "GRPOTrainer", starts)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    done = resumed()
    assert (done.exit_code, json.loads(done.stdout)) == (0, json.loads(json.dumps(result))), done.output
    assert done.stderr == f"{run} has nothing left to train: it has done its 2 steps; raise grpo.total_steps to go on\n"
    with monkeypatch.context() as stood_still:
        stood_still.setattr(build, "state_extra", lambda *_: {"without_signal": 3})
        ended = resumed("grpo.total_steps=9", "grpo.max_steps_without_signal=3")
    assert "grpo.max_steps_without_signal=3 ended it at step 2; raise it to go on" in ended.stderr
    for work in (["grpo.total_steps=3"], [f"data.eval={settings.data.train}"]):
        assert "it starts" in resumed(*work).stderr
    with AdapterStore(archive=run) as store:
        roll_back_stopped(store, 1)
    assert "it starts" in resumed().stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('grpo.report_to=["tensorbord"]', "did you mean 'tensorboard'"),
        ("output_dir=file", "file is a file; choose another"),
        ("output_dir=file/run", "file is a file; choose another"),
        ("output_dir=/proc/run", "/proc is not writable ("),
        ('lora.target_modules=["qproj"]', "has no layer 'qproj'; did you mean 'q_proj'?"),
    ],
)
def test_train_refuses_in_one_sentence_and_leaves_nothing(
    settings: RunConfig, override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real trainer
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_grpo.trainer.room.build_engine", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command's own handler, for a process of its own
    (tmp_path / "file").touch()
    config = save_config(settings, tmp_path / "settings")
    before = sorted(tmp_path.rglob("*"))
    opened: list[Any] = []
    monkeypatch.setattr("lora_grpo.trainer.assembly.AdapterStore", opened.append)
    result = CliRunner().invoke(app, ["train", str(config), override], env={"NO_COLOR": "1"})
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert not opened


@pytest.mark.parametrize("root", [None, "root"])
@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c_while_the_engine_starts_leaves_nothing(
    settings: RunConfig, there: bool, root: str | None, tmp_path: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with something in it stays as it was; SIGTERM comes as the same exception."""
    monkeypatch.undo()  # the real trainer
    run, named = Path(settings.output_dir), None if root is None else str(shm_dir / root)
    if there:
        run.mkdir()
        (run / "notes").write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*_: Any, **__: Any) -> None:
        assert (run / "store.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_grpo.trainer.room.build_engine", interrupted)
    monkeypatch.setattr("lora_grpo.adapters.files.disk._SHM", shm_dir)
    with pytest.raises(KeyboardInterrupt):
        build_trainer(settings.replace(store_root=named))
    assert not list(shm_dir.iterdir())
    if there:
        assert (run / "notes").read_text() == "mine"
    else:
        assert sorted(tmp_path.rglob("*")) == before
    assert not build.check_place(run)


def test_what_lies_in_a_file_of_the_runs_place_is_told_of(llama_dir: Path, tmp_path: Path) -> None:
    """A pipe would be waited for, and the rest end in a traceback, some of them after the last step."""
    run = tmp_path / "run"

    def going_on() -> None:
        with tiny_trainer(llama_dir, fake_engine(llama_dir), run, STEPS, eval_dataset=ROWS[:1]) as trainer:
            trainer.resume()

    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, STEPS, eval_dataset=ROWS[:1]) as trainer:
        trainer.train()
    damages: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a link to nothing": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "half a document": lambda path: path.write_text('{"version": 1,'),
        "another document": lambda path: path.write_text("[]"),
    }
    for name in ("engine.log", "metrics.jsonl", "samples.jsonl", "plot.png", "evaluations/000001.json"):
        path = run / name
        content = path.read_bytes() if path.exists() else None
        for what, damage in damages.items():
            if "document" in what and not name.startswith("evaluations"):
                continue
            path.unlink(missing_ok=True)
            damage(path)
            with pytest.raises(LoraGrpoError, match=f"{path} .*(delete|remove) it"):
                going_on()
            path.rmdir() if path.is_dir() else path.unlink()
        if content is not None:
            path.write_bytes(content)
    going_on()


def test_an_adapter_that_scales_otherwise_does_not_take_the_runs_recipe(llama_dir: Path, tmp_path: Path) -> None:
    """What was published before would be exported with it."""
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path, STEPS) as trainer:
        trainer.train()
    before = (tmp_path / "adapter.json").read_bytes()
    with AdapterStore(archive=tmp_path) as store:
        other = tiny_lora(load_model(llama_dir), r=8, scale=0.02, lora_alpha=77)
        with pytest.raises(ConfigError, match=r"is scaled by 9\.6.*, in the versions of .* by \d"):
            NativeSync(other, fake_engine(llama_dir), store)
    assert (tmp_path / "adapter.json").read_bytes() == before


def test_sigterm_stops_a_training_as_ctrl_c_does(tmp_path: Path) -> None:
    """What stands in for a trainer waits; the command must close it, say how to go on, and end without a traceback."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    config = RunConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(name="a/model"),
        data=DataConfig(train=str(tmp_path / "prompts.jsonl")),
        rewards=(RewardConfig(name="length"),),
    )
    settings = str(save_config(config, tmp_path / "settings"))
    program = (
        "import sys, time, types\n"
        "import lora_grpo.trainer\n"
        "from contextlib import contextmanager\n"
        "def wait():\n"
        "    print('started', flush=True)\n"
        "    time.sleep(600)\n"
        "@contextmanager\n"
        "def build(config, *, resume):\n"
        "    try:\n"
        "        of = types.SimpleNamespace\n"
        "        yield of(train=wait, crew=of(leads=True), store=of(head=None), run_dir='RUN')\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
        "lora_grpo.trainer.build_trainer = build\n"
        "from lora_grpo import cli\n"
        f"sys.argv = ['lora-grpo', 'train', {settings!r}, '--resume']; cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "started\n"
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "closed\n")
    assert "RUN holds no run yet, so a new one begins there" in err
    assert "stopped; go on with: lora-grpo train" in err
    assert "Traceback" not in err


def test_the_settings_of_a_moved_or_copied_run_name_the_run_where_it_lies(settings: RunConfig, tmp_path: Path) -> None:
    run, moved = Path(settings.output_dir), tmp_path / "moved"
    with build_trainer(settings) as trainer:
        trainer.train()
    run.rename(moved)
    for named in (moved, moved / "config.json"):
        config = load_config(named, ["grpo.total_steps=3"])
        assert config.output_dir == str(moved)
    with build_trainer(config, resume=True) as trainer:
        assert trainer.steps_done == 2
    assert not run.exists()


def test_going_on_in_a_copy_or_after_another_machine_is_told(
    settings: RunConfig, shm_dir: Path, tmp_path: Path
) -> None:
    run, copy = Path(settings.output_dir), tmp_path / "copy"

    def go_on(config: RunConfig, *, resume: bool = True) -> Path:
        with build_trainer(config, resume=resume) as trainer:
            trainer.train()
            if not resume:  # as a kill leaves it
                shutil.copytree(trainer.store.root, shm_dir / "left", symlinks=True)
            return trainer.store.root

    def told(where: Path, words: str) -> list[str]:
        return [record["text"] for record in read_metrics(where) if words in record.get("text", "")]

    go_on(settings, resume=False)
    shutil.copytree(run, copy)
    for _ in range(2):
        go_on(load_config(copy))
    (once,) = told(copy, "a copy of the run in")
    assert str(run) in once
    root = go_on(load_config(run))
    assert not told(run, "out of date")
    (shm_dir / "left").rename(root)
    try:
        go_on(load_config(run))
        (aside,) = root.glob("aside-*")
        assert [str(aside) in text for text in told(run, "out of date")] == [True]
    finally:
        shutil.rmtree(root)
    assert not told(run, "a copy of")


def test_rollback_in_a_copy_while_the_original_is_live(shm_dir: Path, tmp_path: Path) -> None:
    from tests.test_cli_versions import answer, lora_grpo

    with AdapterStore(shm_dir, tmp_path / "run") as live:
        for step in (1, 2):
            live.promote(live.publish(adapter(step), step=step))
        live.flush()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        done = lora_grpo("rollback", tmp_path / "copy", "--to", "1", "--timeout", "5")
        assert done.returncode == 0, done.stderr
        heads = {
            name: next(row["version"] for row in answer("versions", tmp_path / name) if row["head"])
            for name in ("run", "copy")
        }
        assert heads == {"run": 2, "copy": 1}


@pytest.mark.parametrize("value", ["good", True, "0.5", 10**400, 1e308, -4e38, [0.5]])
def test_a_reward_that_is_no_number_of_float32_is_refused(shm_dir: Path, value: Any) -> None:
    with AdapterStore(shm_dir) as store:
        store.publish(adapter(1), step=1)
        for name in ("reward", "eval/reward"):
            with pytest.raises(ConfigError, match=f"metric {name}[= ]"):
                store.record(1, **{name: value})
        assert store.metrics(1) == {}
        store.record(1, reward=3.4e38, loss=1e308)
        store.record(1, reward=None, guard="the reward fell", note=True)
        assert store.metrics(1) == {"reward": None, "loss": 1e308, "guard": "the reward fell", "note": True}


def test_what_retention_ranks_is_a_number(shm_dir: Path) -> None:
    from lora_grpo.adapters.upkeep.retention import keep_best, keep_latest

    with AdapterStore(shm_dir, retention=keep_latest(2) | keep_best("accuracy")) as store:
        store.publish(adapter(1), step=1)
        with pytest.raises(ConfigError, match="metric accuracy='high' must be a number or None"):
            store.record(1, accuracy="high")
        store.record(1, grade="high")
