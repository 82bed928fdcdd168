"""A fork goes on as its source did, to the bit, or as its own settings say; what cannot be forked leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_grpo import fork
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.cli import app
from lora_grpo.config import DataConfig, ModelConfig, RewardConfig, RunConfig
from lora_grpo.config_file import load_config, save_config
from lora_grpo.errors import ConfigError, LoraGrpoError
from lora_grpo.metrics.log import history, read_metrics
from tests.test_resume import config, state_at
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, moments, same, tiny_trainer, weights

STEPS = 6


@pytest.fixture(scope="module")
def source(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a rollback after the second: v1 v2 v3, back to v2, then v4 (step 2) to v8 (step 6)."""
    folder = tmp_path_factory.mktemp("source")
    run = folder / "run"
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config(2), eval_dataset=ROWS[:2]) as trainer:
        trainer.train()
        trainer.rollback(2)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config(STEPS), eval_dataset=ROWS[:2]) as trainer:
        trainer.resume()
        trainer.train()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = RunConfig(
        output_dir=str(run),
        model=ModelConfig(name=str(llama_dir)),
        data=DataConfig(train=str(folder / "rows.jsonl")),
        rewards=(RewardConfig(name="tests.tiny_trainer:share_of_low_bytes"),),
        grpo=config(STEPS),
        store_root="/dev/shm/the-source-only",
    )
    save_config(settings, run)
    return run


def resumed(llama_dir: Path, run: Path, settings: Any = None) -> Any:
    trainer = tiny_trainer(llama_dir, fake_engine(llama_dir), run, settings or config(STEPS), eval_dataset=ROWS[:2])
    trainer.resume()
    return trainer


@pytest.mark.parametrize(("version", "step"), [(1, 0), (3, 2), (5, 3)])
def test_a_fork_goes_on_to_the_bit(llama_dir: Path, source: Path, tmp_path: Path, version: int, step: int) -> None:
    """With the run's rollbacks up to that version: they are in every sampling seed. v3 is the branch that was left."""
    made = fork(source, version, tmp_path / "new")
    assert (made.step, made.weights, made.origin.number) == (step, "exact", version)
    with resumed(llama_dir, tmp_path / "new") as trainer:
        assert trainer.rollbacks == (1 if version == 5 else 0)
        assert [metrics["step"] for metrics in trainer.history] == list(range(1, step + 1))
        assert (trainer.version.number, trainer.version.digest) == (version, made.origin.digest)
        trainer.train()
        assert trainer.store.get(version + 1).parent == version
    if version == 5:
        for later in range(step + 1, STEPS + 1):
            ours, theirs = state_at(tmp_path / "new", later), state_at(source, later)
            assert same(ours[0], theirs[0]), f"step {later}"
            assert ours[1] == theirs[1], f"step {later}"
    steps = [record["step"] for record in history(read_metrics(tmp_path / "new")) if record["event"] == "step"]
    assert steps == list(range(1, STEPS + 1))


def test_a_fork_of_a_fork_says_where_each_comes_from(source: Path, tmp_path: Path) -> None:
    fork(source, 5, tmp_path / "one")
    fork(tmp_path / "one", "head", tmp_path / "two")
    for run, parent in ((tmp_path / "one", source), (tmp_path / "two", tmp_path / "one")):
        with AdapterStore(archive=run, readonly=True) as store:
            (version,) = store.list()
            known = store.metrics(version)
            store.verify(version)
        assert (version.number, version.parent, version.step) == (5, None, 3)
        assert [known[f"from/{name}"] for name in ("run", "version", "digest")] == [str(parent), 5, version.digest]
        assert '"from/run"' in (run / "journal.jsonl").read_text()
    steps = [record["step"] for record in read_metrics(tmp_path / "two") if record["event"] == "step"]
    assert steps == [1, 2, 3]


def test_another_learning_rate_holds_from_the_first_step_on(llama_dir: Path, source: Path, tmp_path: Path) -> None:
    """Moments and the count of the schedule are the source's; `train --resume` with a setting is the same."""
    fork(source, 5, tmp_path / "new", ["grpo.learning_rate=1e-3", "grpo.weight_decay=0.1"])
    assert load_config(tmp_path / "new").grpo.learning_rate == 1e-3
    with resumed(llama_dir, tmp_path / "new", config(STEPS).replace(learning_rate=1e-3, weight_decay=0.1)) as trainer:
        group = trainer.policy.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(1e-3 * 3 / 6)
        assert (group["initial_lr"], group["weight_decay"]) == (1e-3, 0.1)
        kept = load_file(source / "states" / "000005" / "state.safetensors")
        assert len(moments(trainer)) == sum(name.startswith("optimizer/") for name in kept)
        trainer.train()
        assert [m["learning_rate"] for m in trainer.history[3:]] == pytest.approx(
            [left * 1e-3 / 12 for left in (5.5, 3.5, 1.5)]
        )
    assert not same(state_at(tmp_path / "new", 4)[0], state_at(source, 4)[0])


def test_another_seed_begins_the_prompts_anew(llama_dir: Path, source: Path, tmp_path: Path) -> None:
    fork(source, 5, tmp_path / "new", ["grpo.seed=11"])
    with resumed(llama_dir, tmp_path / "new", config(STEPS).replace(seed=11)) as trainer:
        assert trainer.source.sampler.state_dict() == {"epoch": 0, "offset": 0, "num_prompts": len(ROWS), "seed": 11}
        assert trainer.steps_done == 3
        trainer.train()
    made = load_config(tmp_path / "new")  # written by the fork
    assert (made.output_dir, made.store_root) == (str(tmp_path / "new"), None)


@pytest.mark.parametrize("state_kept", [True, False])
def test_weights_only_is_a_new_run_from_these_weights(
    llama_dir: Path, source: Path, tmp_path: Path, state_kept: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    exact = load_file(source / "states" / "000005" / "state.safetensors")
    if not state_kept:
        shutil.rmtree(copy / "states" / "000005")
    made = fork(copy, 5, tmp_path / "new", weights_only=True)
    assert (made.step, made.weights) == (0, "exact" if state_kept else "rounded")
    with resumed(llama_dir, tmp_path / "new") as trainer:
        assert (trainer.steps_done, trainer.rollbacks, moments(trainer)) == (0, 0, [])
        assert trainer.policy.optimizer.param_groups[0]["lr"] == CONFIG.learning_rate
        assert trainer.source.sampler.state_dict()["offset"] == 0
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(CONFIG.seed).get_state())
        for name, tensor in weights(trainer).items():
            path = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            kind = "A" if ".lora_A." in name else "B"
            assert torch.equal(tensor, exact[f"weights/{path}.{kind}"])  # fp32 is served here: rounding is nothing
        trainer.train()
        assert (trainer.steps_done, len(trainer.evaluations)) == (STEPS, 2)


@pytest.mark.parametrize(
    ("spoil", "version", "settings", "words"),
    [
        (lambda run: shutil.rmtree(run / "states" / "000005"), 5, [], r"state of v5.* is v(4|6).*--weights-only"),
        (lambda run: shutil.rmtree(run / "states"), 5, [], "nor of any other version"),
        (lambda run: None, 3.5, [], "names no version"),
        (lambda run: None, 99, [], "there is no version 99"),
        (lambda run: None, 5, ["grpo.learning_rat=1"], "did you mean 'learning_rate'"),
        (lambda run: None, 5, ["output_dir=X"], "output_dir=X: the fork's directory is its argument NEW, here .*/new;"),
        (lambda run: None, 5, ["grpo.learning_rate=-1"], r"/copy with grpo\.learning_rate=-1: grpo\.learning_rate: "),
        (lambda run: None, 5, ["lora.r=2"], r"lora\.r=2: the versions of .* were trained with \d+; leave"),
        (lambda run: None, 5, ["model.name=other"], "are adapters of"),
        (lambda run: (run / "config.json").unlink(), 5, ["grpo.seed=1"], "has no config.json"),
        (lambda run: (run / "versions" / "000005" / "adapter_model.safetensors").write_bytes(b"no"), 5, [], "v5"),
        (lambda run: (run / "states" / "000005" / "state.safetensors").write_bytes(b"no"), 5, [], "differs"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"no\n"), 5, [], "is no JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_forked_leaves_nothing(
    source: Path, tmp_path: Path, spoil: Any, version: Any, settings: list[str], words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    spoil(copy)
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(LoraGrpoError, match=words):
        fork(copy, version, tmp_path / "new", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert {path for path in set(Path("/dev/shm").iterdir()) - before if "new" in path.name} == set()


def test_the_command_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    arguments = ["fork", str(source), "v5", str(tmp_path / "new"), "grpo.learning_rate=1e-3"]
    said = CliRunner().invoke(app, arguments, env={"NO_COLOR": "1"})
    assert said.exit_code == 0, said.output
    assert f"{tmp_path / 'new'} starts from v5 of {source}, after step 3, weights exact" in said.output
    assert f"lora-grpo train {tmp_path / 'new'} --resume" in said.output
    listed = CliRunner().invoke(app, ["versions", str(tmp_path / "new")], env={"NO_COLOR": "1"})
    assert "HEAD, fork of run v5" in listed.output


def test_a_directory_that_is_taken_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        fork(source, 5, tmp_path / "new")
    assert (tmp_path / "new" / "note").read_text() == "mine"
    with pytest.raises(LoraGrpoError, match="there is no store in"):
        fork(tmp_path / "new", 5, tmp_path / "other")
    with pytest.raises(ConfigError, match="is inside the run"):
        fork(source, 5, source / "fork")
    assert not (source / "fork").exists()
