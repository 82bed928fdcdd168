"""Sweeps: what is tried, who goes on, who takes over from whom, and that a sweep stopped goes on as if it was not."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import random
import re
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.cli import app
from lora_grpo.config import DataConfig, KeepConfig, LoraSettings, ModelConfig, RewardConfig, RunConfig
from lora_grpo.config_file import load_config, save_config
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import RunLog, history, read_metrics
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.forking import take_over
from lora_grpo.trainer.population.member import Member
from lora_grpo.trainer.sweeping import sweep as sweep_module
from lora_grpo.trainer.sweeping.plan import (
    FACTORS,
    SweepPlan,
    halving_losers,
    is_swept,
    perturbed,
    score,
    takeovers,
    trials_of,
    weighed,
)
from lora_grpo.trainer.sweeping.sweep import Sweep
from tests.test_resume import config
from tests.tiny_models import load_model, tiny_lora
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, moments, same, share_of_low_bytes, tiny_trainer, weights


def test_a_grid_is_every_combination_in_order() -> None:
    trials = trials_of(["grpo.learning_rate=1e-5,3e-5", 'lora.target_modules=["q_proj","v_proj"],all-linear'])
    assert [trial.settings for trial in trials] == [
        ("grpo.learning_rate=1e-5", 'lora.target_modules=["q_proj","v_proj"]'),
        ("grpo.learning_rate=1e-5", "lora.target_modules=all-linear"),
        ("grpo.learning_rate=3e-5", 'lora.target_modules=["q_proj","v_proj"]'),
        ("grpo.learning_rate=3e-5", "lora.target_modules=all-linear"),
    ]
    assert trials[3].name == "3_learning_rate=3e-5_target_modules=all-linear"
    assert len({trial.name for trial in trials}) == 4
    assert all("/" not in trial.name and " " not in trial.name for trial in trials)


def test_draws_lie_in_their_ranges_and_repeat_with_their_seed() -> None:
    swept = ["grpo.learning_rate=log:1e-6..1e-4", "grpo.beta=0.0..0.1", "lora.r=1..8", "grpo.seed=3,5"]
    trials = trials_of(swept, sample=400, seed=7)
    assert trials == trials_of(swept, sample=400, seed=7) != trials_of(swept, sample=400, seed=8)
    values = [[float(text.partition("=")[2]) for text in trial.settings] for trial in trials]
    rates, betas, ranks, seeds = (list(column) for column in zip(*values, strict=True))
    assert min(rates) >= 1e-6
    assert max(rates) <= 1e-4
    # Evenly in the logarithm: half of them below 1e-5, where evenly in the value it would be one in eleven.
    assert sum(rate < 1e-5 for rate in rates) == pytest.approx(200, abs=40)
    assert sum(beta < 0.05 for beta in betas) == pytest.approx(200, abs=40)
    assert set(ranks) == set(range(1, 9))
    assert set(seeds) == {3, 5}


@pytest.mark.parametrize(
    ("swept", "sample", "words"),
    [
        ([], None, "needs a setting with several values"),
        (["grpo.beta"], None, "not of the form"),
        (["grpo.beta=0.0..0.1"], None, "add --sample N"),
        (["grpo.beta=log:0..0.1"], 4, "must be above 0"),
        (["grpo.beta=0.5..0.1"], 4, "must be larger"),
        (["grpo.beta=0,1", "grpo.beta=2,3"], None, "twice"),
        (["grpo.seed=0,0"], None, "there twice"),
        (["grpo.learning_rate=1e-3,,2e-3"], None, "empty"),
        (["grpo.seed=0,1"], 3, "only 2 different members"),
        ([f"grpo.{key}={','.join(map(str, range(40)))}" for key in ("seed", "beta")], None, "more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused(swept: list[str], sample: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trials_of(swept, sample=sample)


def test_no_draw_comes_twice() -> None:
    trials = trials_of(["lora.r=4..9"], sample=6)
    assert {trial.settings for trial in trials} == {(f"lora.r={rank}",) for rank in range(4, 10)}


def test_one_value_is_no_sweep() -> None:
    assert not any(map(is_swept, ["grpo.beta=0.1", "data.train=a/../b.jsonl", 'lora.target_modules=["a","b"]', "x="]))
    assert all(map(is_swept, ["grpo.beta=0.1,0.2", "grpo.beta=0..1", "grpo.beta=log:1e-3..1"]))


def steps(*rewards: float) -> list[dict[str, Any]]:
    return [{"step": number, "reward": reward} for number, reward in enumerate(rewards, 1)]


def test_a_score_is_of_the_steps_up_to_the_rung() -> None:
    assert score(steps(0, 1, 2, 3, 100), 4) == 2.0
    assert score(steps(0, 1), 4) is None
    assert score(steps(1, math.nan), 2) == -math.inf


def test_rewards_are_compared_by_the_same_weights() -> None:
    step = {"step": 3, "reward": 9.0, "rewards/a/mean": 0.5, "rewards/a/std": 4.0, "rewards/b/mean": 2.0}
    assert weighed(step, [1.0, 0.25]) == {**step, "reward": 1.0}
    assert weighed({"reward": 9.0, "rewards/a": 0.5, "rewards/b": None}, [2.0, 1.0])["reward"] == 1.0
    assert math.isnan(weighed({"reward": 9.0, "rewards/a": math.nan}, [2.0])["reward"])


def test_halving_keeps_the_best_and_at_least_one() -> None:
    scores = {"a": 0.1, "b": 0.9, "c": 0.5, "d": -math.inf}
    assert halving_losers(scores, 0.5) == {"a", "d"}
    assert halving_losers(scores, 0.25) == {"a", "c", "d"}
    assert halving_losers({"a": 0.0}, 0.1) == set()
    assert halving_losers({"a": 1.0, "b": 1.0}, 0.5) == {"b"}


def test_losers_take_over_from_winners_alone() -> None:
    scores = {name: float(place) for place, name in enumerate("abcdefgh")}
    pairs = takeovers(scores, 0.25, random.Random(0))
    assert {loser for loser, _ in pairs} == {"a", "b"}
    assert {winner for _, winner in pairs} <= {"g", "h"}
    assert takeovers({"a": 1.0, "b": 1.0, "c": 1.0}, 0.5, random.Random(0)) == []
    assert takeovers({"a": -math.inf, "b": 0.5, "c": -math.inf}, 0.25, random.Random(0)) == [("a", "b"), ("c", "b")]
    assert takeovers({"a": -math.inf}, 0.25, random.Random(0)) == []


def test_a_perturbed_number_stays_of_its_kind() -> None:
    draw = random.Random(0)
    assert {perturbed(2.0, draw) for _ in range(20)} == {2.0 * factor for factor in FACTORS}
    assert {perturbed(1, draw) for _ in range(20)} == {0, 2}
    assert {perturbed(100, draw) for _ in range(20)} == {80, 125}


def test_a_take_over_is_a_new_version_of_the_losers_run(llama_dir: Path, tmp_path: Path) -> None:
    """The winner's weights, optimizer, schedule and step; the loser's seeds, data position and random state."""
    runs = {name: (fake_engine(llama_dir), tmp_path / name) for name in ("loser", "winner")}
    settings = config(4).replace(total_steps=4, learning_rate=5e-4)
    keep = KeepConfig(trainer_state_every=100)
    with (
        tiny_trainer(llama_dir, *runs["winner"], config(4).replace(seed=9)) as winner,
        tiny_trainer(llama_dir, *runs["loser"], settings, keep=keep) as loser,
    ):
        for trainer in (winner, loser):
            trainer.train()
        last, position, drawn = loser.version, loser.source.sampler.state_dict(), torch.get_rng_state()
        assert not same(weights(loser), weights(winner))
        version = take_over(loser, winner)
        assert (version.number, version.parent, version.step) == (last.number + 1, last.number, 4)
        assert (loser.version, version.digest) == (version, winner.version.digest)
        assert same(weights(loser), weights(winner))
        assert same(moments(loser), moments(winner))
        assert loser.policy.scheduler.state_dict() == winner.policy.scheduler.state_dict()
        assert loser.source.sampler.state_dict() == position
        assert torch.equal(torch.get_rng_state(), drawn)
        known = loser.store.metrics(version)
        assert [known[f"from/{name}"] for name in ("run", "version", "digest")] == [
            str(winner.run_dir),
            winner.version.number,
            winner.version.digest,
        ]
    # What the take-over is resumed with is the loser's own setting, in the winner's schedule.
    with tiny_trainer(llama_dir, *runs["loser"], settings.replace(total_steps=6), keep=keep) as loser:
        report = loser.resume()
        assert report is not None
        assert (report.version.number, report.weights, loser.steps_done) == (version.number, "exact", 4)
        assert loser.policy.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * 2 / 6)
        loser.train()
        assert loser.store.get(version.number + 1).parent == version.number


def test_another_form_of_adapter_is_not_taken_over(llama_dir: Path, tmp_path: Path) -> None:
    engines = fake_engine(llama_dir), fake_engine(llama_dir)
    with tiny_trainer(llama_dir, engines[0], tmp_path / "winner", config(1)) as winner:
        winner.train()
        model = tiny_lora(load_model(llama_dir), r=4, scale=0.02)
        arguments = {"engine": engines[1], "run_dir": tmp_path / "loser", "view": False}
        with GRPOTrainer(model, share_of_low_bytes, config(1), ROWS, **arguments) as loser:
            loser.train()
            before, last = weights(loser), loser.version
            with pytest.raises(ConfigError, match=r"cannot take over from .*winner: their adapters differ in rank"):
                take_over(loser, winner)
            with pytest.raises(ConfigError, match="loser cannot take over from itself"):
                take_over(loser, loser)
            assert same(weights(loser), before)
            assert loser.version == last


def settings_of(llama_dir: Path, directory: Path, **changes: Any) -> RunConfig:
    rows = directory.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return RunConfig(
        output_dir=str(directory),
        model=ModelConfig(name=str(llama_dir), dtype="float32"),
        lora=LoraSettings(r=4),
        data=DataConfig(train=str(rows)),
        rewards=(RewardConfig(name="tests.tiny_trainer:share_of_low_bytes"),),
        grpo=config(6),
        keep=KeepConfig(trainer_states=20),
    ).replace(**changes)


def decisions(directory: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (directory / "sweep.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def digests(directory: Path) -> dict[str, dict[int, str]]:
    """Of every member's versions, by step."""
    found = {}
    for run in sorted(path.parent for path in directory.glob("*/store.json")):
        with AdapterStore(archive=run, readonly=True) as store:
            found[run.name] = {version.step: version.digest for version in store.list()}
    return found


class Stopped(KeyboardInterrupt):
    """What Ctrl-C does, at a known moment."""


def test_a_larger_weight_of_a_reward_is_no_better_policy(llama_dir: Path, tmp_path: Path) -> None:
    """Both members learn the same, advantages being scaled: of equals the first goes on, and is the best."""
    settings = settings_of(llama_dir, tmp_path / "sweep", grpo=config(3))
    plan = SweepPlan(settings=settings, trials=trials_of(["rewards.0.weight=1,3"]), rungs=(2,))
    summary = Sweep(plan, engine=fake_engine(llama_dir)).run()
    rung = [record for record in decisions(tmp_path / "sweep") if record["event"] == "rung"]
    assert [record["goes_on"] for record in rung] == [True, False]
    assert rung[0]["score"] == pytest.approx(rung[1]["score"])
    assert summary["best"] == "0_weight=1"


def test_a_refused_sweep_leaves_its_directory_to_the_corrected_one(llama_dir: Path, tmp_path: Path) -> None:
    settings = settings_of(llama_dir, tmp_path / "sweep")
    for swept, words in (
        ("rewards.0.name=tests.tiny_trainer:share_of_low_bytes,nope", r"member 1_name=nope: .*nope"),
        ('data.train="rows.jsonl","missing.jsonl"', r"member 0_train=.*rows.jsonl"),
    ):
        with pytest.raises(ConfigError, match=words):
            Sweep(SweepPlan(settings=settings, trials=trials_of([swept])), engine=fake_engine(llama_dir)).run()
        assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("at_once", [4, 2])
def test_halving_stops_the_worst_and_a_resumed_sweep_is_the_whole_one(
    llama_dir: Path, tmp_path: Path, at_once: int
) -> None:
    trials = trials_of(["grpo.seed=1,2,3,4"])

    def sweep(name: str, show: Any = lambda rows: None, *, resume: bool = False) -> dict[str, Any]:
        directory = tmp_path / name
        made = SweepPlan(settings=settings_of(llama_dir, directory), trials=trials, rungs=(2, 4), at_once=at_once)
        plan = SweepPlan.read(directory) if resume else made
        return Sweep(plan, engine=fake_engine(llama_dir), resume=resume).run(show)

    whole = sweep("whole")
    ended = {record["name"]: record for record in decisions(tmp_path / "whole") if record["event"] == "ended"}
    rung = {r["name"]: r for r in decisions(tmp_path / "whole") if r["event"] == "rung" and r["rung"] == 2}
    assert set(ended) == set(rung) == {trial.name for trial in trials}
    states = [record["state"] for record in ended.values()]
    if at_once == 4:
        assert (states.count("stopped"), whole["steps"]) == (3, 2 * 2 + 4 + 6)
        kept = min(record["score"] for record in rung.values() if record["goes_on"])
        assert kept >= max(record["score"] for record in rung.values() if not record["goes_on"])
    assert whole["steps"] < 4 * 6
    assert whole["best"] in {name for name, record in ended.items() if record["state"] == "finished"}
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "whole" / "best-adapter" / "adapter_config.json").is_file()
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["best"] == whole["best"]

    rounds = iter(range(100))

    def stop(rows: list[dict[str, Any]]) -> None:
        if next(rounds) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        sweep("stopped", stop)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    with pytest.raises(ConfigError, match="holds a sweep already"):
        sweep("stopped")
    resumed = sweep("stopped", resume=True)
    assert {**resumed, "adapter": None} == {**whole, "adapter": None}
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    assert sorted(map(str, decisions(tmp_path / "stopped"))) == sorted(map(str, decisions(tmp_path / "whole")))


def test_population_based_training_passes_versions_on(llama_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    plan = SweepPlan(
        settings=settings_of(llama_dir, directory),
        trials=trials_of(["grpo.seed=1,2,3,4"]),
        evolve_every=2,
        perturb=("grpo.learning_rate",),
    )
    summary = Sweep(plan, engine=fake_engine(llama_dir)).run()
    assert [row["state"] for row in summary["members"]] == ["finished"] * 4
    taken = [record for record in decisions(directory) if record["event"] == "take-over"]
    assert {record["step"] for record in taken} == {2, 4}
    for record in taken:
        with AdapterStore(archive=directory / record["name"], readonly=True) as store:
            version, known = store.get(record["version"]), store.metrics(record["version"])
            own = store.get(version.parent)
        assert (own.step, version.step) == (record["step"], record["step"])
        assert version.digest == record["from"]["digest"] == known["from/digest"]
        assert known["from/run"] == str(directory / record["from"]["run"])
    now = {row["member"]: row["grpo.learning_rate"] for row in summary["members"]}
    assert set(now.values()) != {CONFIG.learning_rate}
    for name, rate in now.items():
        assert load_config(directory / name).grpo.learning_rate == rate
        steps = [record["step"] for record in history(read_metrics(directory / name)) if record["event"] == "step"]
        assert steps == [1, 2, 3, 4, 5, 6]


FAILED: list[str] = []


def fails_once(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
    """For the member that comes to its second step first."""
    if trainer_state.global_step == 1 and not FAILED:
        FAILED.append("now")
        raise ValueError("no reward")
    return share_of_low_bytes(completions)


@pytest.fixture(autouse=True)
def half_of_the_members_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are two take-overs at a step, of which the second can be cut short."""
    monkeypatch.setattr(sweep_module, "LOSE_OR_WIN", 0.5)


def evolving(llama_dir: Path, directory: Path, *swept: str, **changes: Any) -> SweepPlan:
    perturb = ("grpo.learning_rate",)
    settings = settings_of(llama_dir, directory, **changes)
    return SweepPlan(settings=settings, trials=trials_of(swept), evolve_every=2, perturb=perturb)


def test_a_member_that_failed_goes_on_from_a_winner(llama_dir: Path, tmp_path: Path) -> None:
    """One by a reward that raises, one by a learning rate that makes its weights infinite."""
    FAILED.clear()
    rewards = (RewardConfig(name="tests.test_sweep:fails_once"),)
    plan = evolving(llama_dir, tmp_path / "sweep", "grpo.learning_rate=1e-3,1e38,2e-3,3e-3", rewards=rewards)
    failing = [trial.name for trial in plan.trials[:2]]
    summary = Sweep(plan, engine=fake_engine(llama_dir)).run()
    made = decisions(plan.directory)
    assert [record["name"] for record in made if record.get("state") == "failed"] == failing
    assert {record["name"] for record in made if record["event"] == "take-over" and record["step"] == 2} == {*failing}
    assert [(row["state"], row["step"]) for row in summary["members"]] == [("finished", 6)] * 4
    assert all(math.isfinite(row["reward"]) and row["grpo.learning_rate"] < 1 for row in summary["members"])


def test_a_member_that_came_back_is_not_held_for_failed_after_a_resume(llama_dir: Path, tmp_path: Path) -> None:
    """Also where its winner was a step ahead of the one that the decision was for."""
    plan = evolving(llama_dir, tmp_path / "sweep", "grpo.seed=1,2,3,4")
    Sweep(plan)
    name, log = plan.trials[0].name, RunLog(plan.directory / "sweep.jsonl")
    log.append("ended", name=name, state="failed", why="its reward raised")
    log.append("take-over", name=name, step=3)
    log.append("evolved", step=2)
    log.close()
    assert Sweep(plan, resume=True).rows()[0]["state"] == "waiting"


def test_a_take_over_that_is_cut_short_is_completed(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it was, no member goes on with a winner's weights and settings of its own."""

    def sweep(name: str, *, resume: bool = False) -> Any:
        plan = evolving(llama_dir, tmp_path / name, "grpo.seed=1,2,3,4", grpo=config(4))
        summary = {**Sweep(plan, engine=fake_engine(llama_dir), resume=resume).run(), "adapter": None}
        settings = {trial.name: load_config(plan.directory / trial.name).grpo for trial in plan.trials}
        return summary, settings, digests(plan.directory), sorted(map(str, decisions(plan.directory)))

    whole = sweep("whole")
    assert len({settings.learning_rate for settings in whole[1].values()}) > 1
    for moment in ("settings", "take-over", "evolved"):
        with monkeypatch.context() as patched:
            cut_short(patched, moment)
            with pytest.raises(Stopped):
                sweep(moment)
        assert sweep(moment, resume=True) == whole


@pytest.mark.parametrize("kind", ["take-overs", "rungs"])
def test_a_round_that_is_cut_short_is_completed(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By those alone that had not made their step: nobody comes to a decision ahead of the others."""

    def sweep(name: str, *, resume: bool = False) -> Any:
        plan = evolving(llama_dir, tmp_path / name, "grpo.seed=1,2,3", grpo=config(5))
        if kind == "rungs":
            plan = SweepPlan(settings=plan.settings, trials=plan.trials, rungs=(2, 4), at_once=2)
        summary = {**Sweep(plan, engine=fake_engine(llama_dir), resume=resume).run(), "adapter": None}
        return summary, digests(plan.directory), sorted(map(str, decisions(plan.directory)))

    whole, learn = sweep("whole"), Member.learn
    for turn in (5, 7):
        turns = iter(range(1, 100))

        def stopped(member: Member, turns: Iterator[int] = turns, last: int = turn) -> None:
            if next(turns) == last:
                raise Stopped
            learn(member)

        with monkeypatch.context() as patched:
            patched.setattr(Member, "learn", stopped)
            with pytest.raises(Stopped):
                sweep(str(turn))
        assert sweep(str(turn), resume=True) == whole


def cut_short(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Stop an evolution before it writes the second member's settings, or logs a take-over, or that it is done."""
    calls, write = iter(range(100)), RunLog.append

    def second(config: Any, run: Path) -> None:
        if next(calls) == 1:
            raise Stopped
        save_config(config, run)

    def append(log: Any, event: str, **values: Any) -> None:
        if event == moment:
            raise Stopped
        write(log, event, **values)

    if moment == "settings":
        monkeypatch.setattr(sweep_module, "save_config", second)
    else:
        monkeypatch.setattr(RunLog, "append", append)


@contextmanager
def on_a_terminal(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process whose stdin and stderr are a terminal of its own, and the other end of it."""
    ours, its = pty.openpty()
    try:
        with subprocess.Popen(
            command,
            stdin=its,
            stdout=subprocess.PIPE,
            stderr=its,
            env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as process:
            os.close(its)
            yield process, ours
    finally:
        os.close(ours)


def shown_until(terminal: int, pattern: str) -> str:
    """What a terminal shows, up to a pattern or the end of its process; without colours and movements."""
    shown = ""
    while not re.search(pattern, shown):
        try:
            shown += os.read(terminal, 1 << 16).decode(errors="replace")
        except OSError:  # its process has ended
            return shown
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    return shown


ON_A_FAKE = """
import sys
from pathlib import Path
from lora_grpo import cli
from lora_grpo.trainer import room
from tests.tiny_run import fake_engine
room.build_engine = lambda model, *_, **__: fake_engine(Path(model.name))
cli.main()
"""
"""The command, whose engine alone is not vLLM's."""


def test_ctrl_c_stops_a_sweep_which_goes_on_as_if_it_had_not(llama_dir: Path, tmp_path: Path) -> None:
    plan = evolving(llama_dir, tmp_path / "whole", "grpo.seed=1,2", grpo=config(4))
    whole = Sweep(plan, engine=fake_engine(llama_dir)).run()
    (tmp_path / "run.json").write_text(settings_of(llama_dir, tmp_path / "stopped", grpo=config(4)).model_dump_json())
    command = [sys.executable, "-c", ON_A_FAKE, "sweep"]
    options = ["--evolve-every", "2", "--perturb", "grpo.learning_rate"]
    with on_a_terminal(*command, str(tmp_path / "run.json"), "grpo.seed=1,2", *options) as (process, terminal):
        table = shown_until(terminal, r"1_seed=2 +│ running +│ +[1-3] ")
        os.write(terminal, b"\x03")
        said = shown_until(terminal, "never")
        assert process.wait(60) == 130, table + said
    header = r"member +┃ state +┃ step ┃ reward ┃ held_out ┃ why ┃ grpo.seed ┃ grpo.learning_rate"
    for pattern in (header, r"0_seed=1 │ waiting │ +0 │ +- +│ +- +│ +- +│ +1 │ +0.002 │"):
        assert re.search(pattern, table), table
    assert "Traceback" not in said
    assert "stopped; go on with: lora-grpo sweep" in said
    assert not (tmp_path / "stopped" / "summary.json").exists()
    resumed = subprocess.run([*command, str(tmp_path / "stopped"), "--resume"], capture_output=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr[-3000:].decode()
    # A number that was given out when Ctrl-C came is not given out again.
    assert {**json.loads(resumed.stdout), "adapter": None, "version": None} == {
        **whole,
        "adapter": None,
        "version": None,
    }
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    ours, theirs = (
        sorted(re.sub(r"'version': \d+", "", str(record)) for record in decisions(tmp_path / name))
        for name in ("stopped", "whole")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rungs": (6,)}, "a rung at step 6 must be from 1 to 5"),
        ({"keep": 1.0}, r"keep: must be a number, above 0, below 1 \(got 1.0\)"),
        ({"keep": 0.3}, "give --rungs"),
        ({"trials": trials_of(["output_dir=a,b"])}, "a place of its own"),
        ({"perturb": ("grpo.beta",)}, "give --evolve-every"),
        ({"evolve_every": 2, "rungs": (2,)}, "and no rungs"),
        ({"evolve_every": 2, "at_once": 1}, "compares all 2 at once"),
        ({"evolve_every": 2, "perturb": ("grpo.loss_type",)}, "only numbers can be perturbed"),
        ({"trials": trials_of(["engine.max_loras=2,3"])}, "members share one engine"),
        ({"trials": trials_of(["grpo.learning_rat=2,3"])}, "did you mean 'learning_rate'"),
        ({"trials": trials_of(["lora.r=2,3"]), "evolve_every": 2}, "need the same lora settings"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_written(
    llama_dir: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"trials": trials_of(["grpo.seed=1,2"]), **changes}
    with pytest.raises(ConfigError, match=words):
        SweepPlan(settings=settings_of(llama_dir, tmp_path / "sweep"), **arguments)
    assert not (tmp_path / "sweep").exists()


def test_the_command_refuses_in_a_sentence_and_writes_nothing(llama_dir: Path, tmp_path: Path) -> None:
    file, directory = tmp_path / "run.json", tmp_path / "sweep"
    file.write_text(settings_of(llama_dir, directory).model_dump_json())
    for arguments, words in (
        ([str(file), "grpo.seed=1"], "needs a setting with several values"),
        ([str(file), "grpo.seed=1,2", "--sample", "0"], "or equal to 1"),
        ([str(file), "grpo.seed=1,2", "--rungs", "9"], "a rung at step 9 must be from 1 to 5"),
        ([str(file), "grpo.seed=1,2", "grpo.total_steps=0"], "grpo.total_steps"),
        ([str(tmp_path), "--resume"], "is not a sweep"),
    ):
        said = CliRunner().invoke(app, ["sweep", *arguments], env={"NO_COLOR": "1"})
        assert said.exit_code == 2, said.output
        assert words in said.output
    assert not directory.exists()
