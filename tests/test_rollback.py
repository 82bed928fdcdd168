"""Rollback on real vLLM: engine and trainer are what they were, or nothing has changed at all."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import KeepConfig
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, EngineError, StoreCorrupt, StoreError, UnknownVersion
from lora_grpo.grpo.batch import Batch
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.types import Sampling
from tests.tiny_models import load_model, refill_lora, tiny_lora
from tests.tiny_trainer import moments, same, share_of_low_bytes, tiny_trainer, weights

pytestmark = pytest.mark.vllm

GREEDY = Sampling(max_tokens=12, temperature=0.0, seed=0)
PROMPTS = ["the quick brown", "0123456", "fox"]
OPENED: list[str] = []
LISTENING: list[Path] = []


def listen(event: str, args: tuple[Any, ...]) -> None:
    if LISTENING and event == "open" and str(args[0]).startswith(str(LISTENING[0])):
        OPENED.append(str(args[0]))


sys.addaudithook(listen)


class Witness:
    """Remembers what the engine said at a version and what the trainer made of its first batch there."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.trainer: GRPOTrainer
        self.served: Any = None
        self.batches: list[Batch] = []
        self.prompts: list[list[str]] = []
        self.updated: dict[str, torch.Tensor] = {}

    def reward(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        if self.trainer.version.number == self.number:
            self.prompts.append(list(prompts))
            self.served = self.served or what_is_served(self.trainer.engine, self.trainer.version)
        return share_of_low_bytes(completions)

    def watch(self, trainer: GRPOTrainer) -> GRPOTrainer:
        self.trainer, update = trainer, trainer.policy.update

        def watched(batch: Batch, **judged: Any) -> dict[str, float]:
            here = trainer.version.number == self.number
            metrics = update(batch, **judged)
            if here:
                self.batches.append(batch)
                self.updated = self.updated or weights(trainer)
            return metrics

        trainer.policy.update = watched  # type: ignore[method-assign]
        return trainer


def what_is_served(engine: Any, version: Any) -> tuple[list[Any], list[list[float]]]:
    """Greedy tokens with their log-probs, and the log-probs of fixed tokens."""
    groups = engine.generate(PROMPTS, GREEDY, adapter=version)
    said = [(c.token_ids, c.logprobs) for group in groups for c in group.completions]
    return said, engine.logprobs([list(range(10, 30)), list(range(40, 50))], adapter=version)


@pytest.fixture(scope="module")
def ten(llama_dir: Path, llama_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    """A run of ten versions."""
    witness = Witness(4)
    run = tmp_path_factory.mktemp("ten") / "run"
    with tiny_trainer(llama_dir, llama_engine, run, reward_funcs=witness.reward) as trainer:
        witness.watch(trainer).train()
        yield witness


def test_version_four_is_back_in_every_bit_and_the_run_goes_on_as_eleven(ten: Witness) -> None:
    trainer, sampled = ten.trainer, ten.trainer.source.sampler.state_dict()
    assert [version.number for version in trainer.store.list()] == list(range(1, 11))
    assert 4 not in [version.number for version in trainer.engine.loaded()]
    report = trainer.rollback(to=4)
    assert (report.weights, report.optimizer, report.scheduler, report.random_state) == ("exact", *["restored"] * 3)
    assert trainer.version.number == 4
    assert trainer.steps_done == 3
    assert what_is_served(trainer.engine, trainer.version) == ten.served
    # Two optimizer updates with rows shuffled in between: weights, moments, schedule and random state all enter.
    trainer.policy.update(ten.batches[0])
    assert same(weights(trainer), ten.updated)
    trainer.rollback(to=4)
    assert not same(weights(trainer), ten.updated)
    assert trainer.source.sampler.state_dict() == sampled
    trainer.train()
    assert trainer.store.get(11).parent == 4
    assert trainer.store.get(11).step == 4
    assert trainer.store.get(16).parent == 15
    assert ten.prompts[0] != ten.prompts[-1]
    assert trainer.rollbacks == 2
    assert [metrics["step"] for metrics in trainer.history] == list(range(1, 10))


def test_a_version_that_is_still_loaded_is_served_without_reading_it(ten: Witness) -> None:
    trainer = ten.trainer
    loaded = [version.number for version in trainer.engine.loaded()]
    before = trainer.version
    LISTENING.append(trainer.store.root)
    try:
        trainer.rollback(to=loaded[0])
        opened = list(OPENED)
    finally:
        LISTENING.clear()
        OPENED.clear()
    assert before.number != loaded[0]
    assert opened == []
    assert trainer.version.number == loaded[0]


def test_a_version_that_left_tmpfs_comes_back_from_the_archive(ten: Witness) -> None:
    trainer = ten.trainer
    trainer.rollback(to=1)
    trainer.store.verify(1)
    assert trainer.store.where(1) == {"tmpfs", "archive", "state"}
    assert trainer.version.path.is_dir()


@pytest.mark.parametrize("stage", ["archive", "state", "load", "restore", "promote"])
def test_a_failure_at_any_stage_changes_nothing(ten: Witness, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ten.trainer
    engine, store, scheduler = trainer.engine, trainer.store, trainer.policy.scheduler
    trainer.rollback(to="best:reward")
    loaded = {version.number for version in engine.loaded()}
    target = next(v for v in store.list() if v.number not in loaded and "tmpfs" in store.where(v.number))
    before = (weights(trainer), moments(trainer), scheduler.state_dict(), store.head, torch.get_rng_state())
    served, rollbacks = engine.loaded(), trainer.rollbacks
    expected: Any = EngineError
    if stage == "archive":
        monkeypatch.setattr(type(store), "restore", lambda *_: (_ for _ in ()).throw(StoreCorrupt("damaged")))
        expected = StoreCorrupt
    elif stage == "state":
        state = store.archive / "states" / f"{target.number:06d}" / "state.safetensors"
        whole = state.read_bytes()
        state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        expected = StoreCorrupt
    elif stage == "load":
        load = engine.load

        def failing(version: Any) -> Any:
            if version == target:
                load(version)
                raise EngineError("no")
            return load(version)

        monkeypatch.setattr(engine, "load", failing)
    elif stage == "restore":
        real, calls = type(scheduler).load_state_dict, []

        def once(self: Any, state: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise StoreCorrupt("a schedule of another kind")
            real(self, state)

        monkeypatch.setattr(type(scheduler), "load_state_dict", once)
        expected = StoreCorrupt
    else:
        (store.root / ".HEAD.new").mkdir()
        expected = StoreError
    try:
        with pytest.raises(expected):
            trainer.rollback(to=target.number)
    finally:
        if stage == "promote":
            (store.root / ".HEAD.new").rmdir()
        if stage == "state":
            state.write_bytes(whole)
    monkeypatch.undo()
    assert same(weights(trainer), before[0])
    assert same(moments(trainer), before[1])
    assert scheduler.state_dict() == before[2]
    assert store.head == before[3]
    assert torch.equal(torch.get_rng_state(), before[4])
    assert engine.loaded() == served
    assert trainer.rollbacks == rollbacks
    assert store._catalog.leases.by_key.keys() >= {version.number for version in served}
    engine.generate(["still"], GREEDY, adapter=trainer.version)


def test_a_version_can_be_named_by_its_place_and_by_what_it_did(ten: Witness) -> None:
    trainer = ten.trainer
    six = trainer.store.get(6)
    assert trainer.rollback(to=six).version == six
    assert trainer.rollback("parent").version.number == 5
    rewards = {v.number: trainer.store.metrics(v.number).get("reward") for v in trainer.store.list()}
    best = max((value, number) for number, value in rewards.items() if value is not None)[1]
    assert trainer.rollback("best:reward").version.number == best
    for number, kl in ((2, 0.5), (3, 0.25), (5, 0.75)):
        trainer.store.record(number, drift=kl)
    assert trainer.rollback("best:-drift").version.number == 3
    assert trainer.rollback("best:drift").version.number == 5


@pytest.mark.parametrize(
    ("to", "words"),
    [
        (99, "there is no version 99"),
        (0, "no version 0"),
        (
            "best:charm",
            r"'charm'; recorded are: .*reward.*: record it with store\.record.*'best:METRIC'.*by its number",
        ),
        ("heads", "'heads' names no"),
        (3.0, "3.0 names no"),
    ],
)
def test_what_is_not_there_is_named(ten: Witness, to: Any, words: str) -> None:
    before = ten.trainer.version, ten.trainer.rollbacks
    with pytest.raises((UnknownVersion, ConfigError), match=words):
        ten.trainer.rollback(to)
    assert (ten.trainer.version, ten.trainer.rollbacks) == before


def test_the_first_version_has_no_parent(ten: Witness) -> None:
    ten.trainer.rollback(to=1)
    with pytest.raises(UnknownVersion, match="v1 is the first version and has no parent"):
        ten.trainer.rollback("parent")


def test_the_best_version_is_the_one_that_made_the_best_completions(tmp_path: Path, shm_dir: Path) -> None:
    """The reward seen while publishing v3 is v2's; of equals the newest is named, and text is no score."""
    files = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [b"x"]}
    with AdapterStore(shm_dir / "root", tmp_path / "run") as store:
        for step in range(4):
            store.promote(store.publish(files, step=step))
        for number, reward in ((1, 0.1), (2, 0.9), (3, 0.9)):
            store.record(number, reward=reward, verdict="ok")
        assert store.get("best:reward").number == 3
        with pytest.raises(UnknownVersion, match="recorded are: reward"):
            store.get("best:verdict")


def test_without_its_state_a_version_comes_back_rounded_and_the_report_says_so(
    llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path
) -> None:
    with tiny_trainer(llama_dir, llama_engine, tmp_path / "run", keep=KeepConfig(trainer_state_every=100)) as trainer:
        seen: dict[str, torch.Tensor] = {}
        push = trainer.sync.push

        def watched(step: int, **extra: Any) -> Any:
            version = push(step, **extra)
            if version.number == 3:
                seen.update(weights(trainer))
            return version

        trainer.sync.push = watched  # type: ignore[method-assign]
        trainer.train()
        schedule = trainer.policy.scheduler.state_dict()
        report = trainer.rollback(to=3)
        assert (report.weights, report.optimizer, report.scheduler, report.random_state) == (
            "rounded",
            "reset",
            "kept",
            "kept",
        )
        assert "weights rounded, optimizer reset, scheduler kept" in str(report)
        assert report.extra == {}
        assert trainer.steps_done == 2
        assert moments(trainer) == []
        assert trainer.policy.scheduler.state_dict() == schedule
        for name, value in weights(trainer).items():
            torch.testing.assert_close(value, seen[name], rtol=2**-7, atol=1e-6)
        assert not same(weights(trainer), seen)


def test_own_loops_roll_back_too(llama_dir: Path, llama_engine: VLLMEngine, shm_dir: Path, tmp_path: Path) -> None:
    """Without an optimizer, without an archive: what can be restored is, and the report says what is not there."""
    model = tiny_lora(load_model(llama_dir), r=8)
    with AdapterStore(shm_dir / "root") as store:
        sync = NativeSync(model, llama_engine, store)
        first = sync.push(step=0)
        served = what_is_served(llama_engine, first)
        refill_lora(model, seed=1)
        second = sync.push(step=1)
        assert what_is_served(llama_engine, second) != served
        report = sync.rollback(to=1)
        assert (report.weights, report.optimizer, report.scheduler) == ("rounded", "none", "none")
        assert what_is_served(llama_engine, sync.head) == served
        shutil.rmtree(second.path)
        llama_engine.unload(second)
        with pytest.raises(UnknownVersion, match="deleted by another program"):
            sync.rollback(to=2)
        assert sync.head == first
        assert sync.push(step=2).parent == 1
        sync.close()
