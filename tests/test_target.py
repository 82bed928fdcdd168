"""One grammar for versions: in the store, in engines, on the command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import DataConfig, ModelConfig, RewardConfig, RunConfig
from lora_grpo.config_file import save_config
from lora_grpo.engines.base import Engine
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.errors import ConfigError, UnknownVersion
from lora_grpo.trainer import replay
from lora_grpo.trainer.guards import Guard, NonFinite
from lora_grpo.types import Completion, Group, Sampling
from tests.store_files import adapter
from tests.test_cli_versions import answer
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, tiny_trainer


@pytest.fixture
def store(shm_dir: Path, tmp_path: Path) -> Iterator[AdapterStore]:
    """Five versions of which the fourth is `HEAD`; 2 has the best reward, 3 the best held-out one."""
    with AdapterStore(shm_dir / "root", tmp_path / "run") as store:
        for step in range(5):
            version = store.publish(adapter(step), step=step)
            if step < 4:
                store.promote(version)
            store.record(version, reward=[0.1, 0.9, 0.5, 0.2, 0.3][step], loss=float(step))
        yield store


WAYS: list[tuple[Any, int]] = [
    (3, 3),
    (np.int64(3), 3),
    ("3", 3),
    ("v3", 3),
    ("V3", 3),
    ("head", 4),
    ("HEAD", 4),
    ("parent", 3),
    ("best", 2),
    ("best:reward", 2),
    ("best:loss", 5),
    ("best:-loss", 1),
    ("Best:-loss", 1),
]


@pytest.mark.parametrize(("to", "number"), WAYS)
def test_the_store_takes_every_way_to_name_a_version(store: AdapterStore, to: Any, number: int) -> None:
    version = store.get(to)
    assert version.number == number
    assert store.get(version) == version
    store.pin(to)
    assert store.pins == {number}
    assert store.metrics(to) == store.metrics(number)
    assert store.where(version) >= {"tmpfs"}
    with store.lease(to) as leased:
        assert leased == version
    store.unpin(version)
    store.promote(to)
    assert store.head == version


def test_best_is_by_held_out_reward_where_it_chooses(store: AdapterStore) -> None:
    """A run that still goes on was evaluated as it began, and that version alone is no best."""
    store.record(1, **{"eval/reward": 0.5})
    assert store.get("best").number == 2
    store.record(3, **{"eval/reward": 0.7})
    assert store.get("best").number == 3
    assert store.get("best:reward").number == 2


@pytest.mark.parametrize("to", ["", "4x", "-1", "bestest", "best:", "best:-", "heads", "v", 3.0, None, True, [3]])
def test_what_names_no_version_is_refused_with_the_grammar(store: AdapterStore, to: Any) -> None:
    for asks in (store.get, store.pin, store.metrics, store.promote, store.acquire):
        with pytest.raises(ConfigError, match=r"names no version; use a number \(12 or v12\), 'head'"):
            asks(to)
    with pytest.raises(ConfigError, match="names no version"):
        Guard(NonFinite(), to=to)


def test_a_version_of_another_store_is_not_taken_for_this_ones(store: AdapterStore, shm_dir: Path) -> None:
    with AdapterStore(shm_dir / "other") as other:
        foreign = other.publish(adapter(77), step=0)
        for asks in (store.get, store.pin, store.promote):
            with pytest.raises(UnknownVersion, match="v1 is from another store"):
                asks(foreign)


@pytest.mark.parametrize("engine", ["fake", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_an_engine_says_what_to_pass(
    engine: str, shm_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    here: Engine = (
        FakeEngine(lambda prompt, version, seed: "meow")
        if engine == "fake"
        else request.getfixturevalue("llama_engine")
    )
    loaded, sampling, wrong = here.loaded(), Sampling(max_tokens=2), AdapterVersion(1, None, tmp_path, "", 0, 0.0)
    for prompts in ("Say cat", {"role": "user", "content": "Say cat"}, b"Say cat"):
        with pytest.raises(ConfigError, match=r"is one prompt, not a list of them; pass \[prompt\]"):
            here.generate(prompts, sampling, adapter=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"prompt 0 .* is a message.*pass \[prompt\]"):
        here.generate([{"role": "user", "content": "Say cat"}], sampling, adapter=None)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"prompt 0 \(5\) is a token, .*pass \[prompt\]"):
        here.generate([5, 6], sampling, adapter=None)  # type: ignore[list-item]
    for prompt in (None, 1.5, [1, "cat"], {3}, b"cat"):
        with pytest.raises(ConfigError, match=r"prompt 0 .* must be text, a list of token ids"):
            here.generate([prompt], sampling, adapter=None)  # type: ignore[list-item]
    for named in (3, "v3", "best", [3], ["v3"]):
        with pytest.raises(ConfigError, match=r"pass store\.get\((3|'best')\)"):
            here.generate(["cat"], sampling, adapter=named)  # type: ignore[arg-type]
    for asks in (here.load, here.unload, lambda v: here.logprobs([[1, 2]], adapter=v)):
        with pytest.raises(ConfigError, match=r"pass store\.get\(3\)"):
            asks("v3")  # type: ignore[arg-type]
    with pytest.raises(UnknownVersion, match="v1 is not loaded"):
        here.generate(["cat"], sampling, adapter=[wrong])
    assert here.loaded() == loaded


def test_commands_take_every_way_to_name_a_version(store: AdapterStore, tmp_path: Path) -> None:
    store.close()
    run = tmp_path / "run"
    for to, number in (("v3", 3), ("head", 4), ("parent", 3), ("best", 2), ("best:-loss", 1)):
        assert answer("show", run, to)["version"] == number
    assert answer("pin", run, "best")["pins"] == [2]
    assert answer("unpin", run, "v2")["pins"] == []
    assert answer("rollback", run, "--to", "best")["version"] == 2


def test_replays_of_a_run_take_every_way_to_name_a_version(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    config = CONFIG.replace(total_steps=2, vllm_importance_sampling_correction=False)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config, eval_dataset=ROWS[:2]) as trainer:
        trainer.train()
        for number, reward in ((1, 0.2), (2, 0.9), (3, 0.4)):
            trainer.store.record(number, **{"eval/reward": reward})
    settings = RunConfig(
        output_dir=str(run),
        model=ModelConfig(name=str(llama_dir)),
        data=DataConfig(train=str(rows), eval=str(rows)),
        rewards=(RewardConfig(name="tests.tiny_trainer:share_of_low_bytes"),),
        grpo=config,
    )
    save_config(settings, run)
    monkeypatch.setattr(replay, "build_engine", lambda *_, **__: fake_engine(llama_dir))
    rows_of = replay.evaluate_run(run, versions=["best", "v1", "head", 1])
    assert [row["version"] for row in rows_of] == [2, 1, 3]
    found = replay.compare_run(run, "parent", "best:-eval/reward", rows, samples=1, temperature=None, seed=0)
    assert (found.first, found.second) == (2, 1)
    with pytest.raises(ConfigError, match="'bestest' names no version"):
        replay.evaluate_run(run, versions=["bestest"])
    # A run that evaluated nothing yet: what is named can be evaluated all the same.
    shutil.rmtree(run / "evaluations")
    assert [(row["version"], row["recorded"]) for row in replay.evaluate_run(run, versions=["head"])] == [(3, None)]
    with pytest.raises(ConfigError, match="has evaluated no version yet; name one"):
        replay.evaluate_run(run)


def test_answers_that_no_function_scores_are_left_out_of_a_comparison() -> None:
    """Three prompts of one answer each; of the second one version's has no reward."""
    rewards_B = torch.tensor([0.0, math.nan, 0.5, 1.0, 0.25, 0.5], dtype=torch.float64)
    groups = [
        Group("p", (1,), (Completion("", (1, 2), (-0.5, -0.5), "stop", number),)) for number in (1, 1, 1, 2, 2, 2)
    ]
    pair: Any = [SimpleNamespace(number=1), SimpleNamespace(number=2)]
    logp_VB = torch.full((2, 6), -1.0, dtype=torch.float64)
    found = replay._comparison(pair, groups, rewards_B, logp_VB, samples=1)
    assert found.reward == replay.Difference(0.25, 0.75, 0.5, 0.5)
    assert [answer.reward for answer in found.answers] == [0.0, None, 0.5, 1.0, 0.25, 0.5]
    unscored_B = torch.full((6,), math.nan, dtype=torch.float64)
    assert replay._comparison(pair, groups, unscored_B, logp_VB, samples=1).reward is None
