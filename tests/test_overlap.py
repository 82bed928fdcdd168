"""Sampling ahead of training: which version made what, what is thrown away, and how each part's end is told.

Order is forced with events, never with sleeps: a rollout is held until what is to happen meanwhile has happened.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from lora_grpo.adapters.peft_form.serving import Held, ServingForm, weights_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines import compat
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.engines.local.running import StepDriver
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.engines.wrapped import OwnedEngine
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, RewardError, TrainingError
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.guards import Guard
from lora_grpo.trainer.loop import learn
from lora_grpo.trainer.overlap import Ahead, lag_behind
from lora_grpo.trainer.rollouts import Rollout, Source
from lora_grpo.trainer.room import Wanted, plan_room
from lora_grpo.types import Completion, Group, Sampling
from lora_grpo.worker import Worker
from tests.tiny_models import load_model, refill_lora, tiny_lora
from tests.tiny_trainer import CONFIG, ROWS, moments, same, share_of_low_bytes, tiny_trainer, weights

BOUND_S = 30.0
"""Far more than any wait here takes, far less than a hang."""

SEPARABLE = CONFIG.replace(total_steps=6, learning_rate=6e-3, lr_scheduler_type="constant", canary_every=2)
"""One version's log-probs lie far from the next one's, and the policy has not collapsed by the last step."""

SAMPLING = Sampling(n=4, max_tokens=8, seed=11, ignore_eos=True)
PROMPTS = [row["prompt"] for row in ROWS[:4]]


def arrived(event: threading.Event) -> None:
    assert event.wait(BOUND_S), "what this waits for never happened"


def workers() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("lora_grpo-generator")}


# The synchronous trainer is what it was.


@pytest.mark.vllm
def test_zero_is_the_plain_loop_to_the_bit(llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path) -> None:
    with tiny_trainer(llama_dir, llama_engine, tmp_path / "run", CONFIG.replace(total_steps=4)) as trainer:
        trainer.train()
        assert type(trainer.source) is Source
        assert trainer.engine is llama_engine
        assert workers() == set()
        digests = [version.digest for version in trainer.store.list()]
        result = weights(trainer), moments(trainer)
    assert not any(name.startswith("sample/") for metrics in trainer.history for name in metrics)
    with tiny_trainer(llama_dir, llama_engine, tmp_path / "plain", CONFIG.replace(total_steps=4)) as plain:
        torch.manual_seed(CONFIG.seed)
        plain.sync.push(0)
        for step in range(1, 5):
            rollout = plain.source.draw(step)
            plain.source.sample(rollout, plain.version)
            learn(plain.parts, plain.config, plain.source.reward(rollout), step)
            plain.sync.push(step)
        assert [version.digest for version in plain.store.list()] == digests
        assert same(weights(plain), result[0])
        assert same(moments(plain), result[1])


# Every completion is its own version's.


@pytest.mark.vllm
@pytest.mark.parametrize("most", [1, 2])
def test_each_completion_was_made_by_the_version_stamped_on_it(
    llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    made: list[Group] = []
    sample = Source.sample

    def noting(source: Source, rollout: Rollout, version: AdapterVersion) -> None:
        sample(source, rollout, version)
        made.extend(rollout.groups)

    monkeypatch.setattr(Source, "sample", noting)
    with tiny_trainer(
        llama_dir, llama_engine, tmp_path / "run", SEPARABLE.replace(max_staleness=most), keep=keeping(20)
    ) as trainer:
        trainer.train()
        versions = trainer.store.list()
        assert [version.step for version in versions] == list(range(7))
        rows = [(group.prompt_token_ids, completion) for group in made for completion in group.completions]
        assert len(rows) == 6 * 16
        gaps_VB = torch.tensor([gaps_of(trainer, version, rows) for version in versions])
    own_B = torch.tensor([completion.version - 1 for _, completion in rows])
    own_gap_B = gaps_VB.gather(0, own_B[None])[0]
    others_VB = gaps_VB.scatter(0, own_B[None], torch.inf)
    print(f"gap to its own version at most {own_gap_B.max():.4f}, to the nearest other {others_VB.min():.4f} nats")
    assert own_gap_B.mean() < 0.03
    assert (gaps_VB.argmin(0) == own_B).float().mean() > 0.95, "a completion fits another version better than its own"
    others_mean_V = torch.stack([gaps_VB[:, own_B == v].mean(1) for v in own_B.unique()])
    assert (others_mean_V.topk(2, dim=1, largest=False).values[:, 1] > 5 * own_gap_B.mean()).all()
    lags = [metrics["sample/staleness_max"] for metrics in trainer.history]
    assert lags == [metrics["step"] - metrics["version"] for metrics in trainer.history]
    assert 1 <= max(lags) <= most
    assert trainer.history[-1]["sample/dropped_stale_total"] == 0
    verdicts = [metrics["canary/verdict"] for metrics in trainer.history if "canary/verdict" in metrics]
    assert len(verdicts) >= 3
    assert "failed" not in verdicts
    assert "ok" in verdicts


def keeping(count: int) -> Any:
    from lora_grpo.config import KeepConfig

    return KeepConfig(on_tmpfs=count, trainer_states=count)


def gaps_of(trainer: GRPOTrainer, version: AdapterVersion, rows: Sequence[tuple[Any, Completion]]) -> list[float]:
    """Mean |trainer's replay of `version` - sampler| of each row, nats per token."""
    sequences = [[*prompt, *completion.token_ids] for prompt, completion in rows]
    with weights_of(version, trainer.sync._form.modules):
        replayed = teacher_logprobs(trainer.model, sequences)
    return [
        mean_abs_difference([logp[len(prompt) - 1 :]], [completion.logprobs])
        for logp, (prompt, completion) in zip(replayed, rows, strict=True)
    ]


@pytest.mark.vllm
def test_a_canary_of_an_earlier_version_replays_that_one(
    llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path
) -> None:
    with tiny_trainer(llama_dir, llama_engine, tmp_path / "run", SEPARABLE.replace(total_steps=3)) as trainer:
        trainer.train()
        before, second = weights(trainer), trainer.store.get(2)
        groups = trainer.engine.generate(PROMPTS, SAMPLING, adapter=second)
        report = trainer.sync.canary(groups, version=second)
        rows = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
        drift = sum(gaps_of(trainer, trainer.version, rows)) / len(rows)
        assert report.verdict == "ok"
        assert 5 * report.gap < drift, "the trainer's own weights would have shown how far it went since"
        base = trainer.engine.generate(PROMPTS, SAMPLING, adapter=None)
        claimed = [Group(g.prompt, g.prompt_token_ids, tuple(restamped(c, 2) for c in g.completions)) for g in base]
        with pytest.raises(DeliveryError, match="were not made by v2"):
            trainer.sync.canary(claimed, version=second)
        with pytest.raises(ConfigError, match="cannot be checked against v4"):
            trainer.sync.canary(groups)
        assert same(weights(trainer), before)


def restamped(completion: Completion, version: int) -> Completion:
    return Completion(completion.text, completion.token_ids, completion.logprobs, completion.finish_reason, version)


# A batch that mixes versions is corrected row by row.


def test_each_row_is_corrected_by_its_own_samplers_log_probs(llama_dir: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(vllm_importance_sampling_mode="sequence_truncate", vllm_importance_sampling_clip_max=1e9)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), tmp_path / "run", config) as trainer:
        draw = random.Random(0)

        def group(version: int, shift: float) -> Group:
            def completion() -> Completion:
                ids = tuple(draw.randrange(10, 200) for _ in range(4))
                return Completion("", ids, tuple(-5.0 + shift for _ in ids), "stop", version)

            return Group("", (20, 21), tuple(completion() for _ in range(4)))

        old, new = group(1, -1.0), group(2, 0.5)
        objective, policy = trainer.policy.objective, trainer.policy

        def prepared(groups: list[Group]) -> Batch:
            return policy.prepare(Batch.from_groups(groups, torch.ones(4 * len(groups))))

        mixed = prepared([old, new])
        weight_B1, *alone = [objective.correction(one) for one in (mixed, prepared([old]), prepared([new]))]
        torch.testing.assert_close(weight_B1, torch.cat(alone))
        # pi_old is the policy that is trained, whatever version sampled: the clip's ratio starts at 1.
        assert torch.equal(objective.ratio(mixed.old_logp_BT, mixed), torch.ones_like(mixed.old_logp_BT))
        sampler_B = torch.tensor([sum(c.logprobs) for one in (old, new) for c in one.completions])
        torch.testing.assert_close(weight_B1[:, 0], (mixed.old_logp_BT.sum(1) - sampler_B).exp())


def test_late_batches_need_the_correction() -> None:
    with pytest.raises(ConfigError, match="max_staleness=1 trains on completions of earlier versions"):
        GRPOConfig(max_staleness=1, vllm_importance_sampling_correction=False)


# One thread owns the engine, and a load waits for a step of it only.


class Shelf:
    """Publishes versions that all differ."""

    def __init__(self, store: AdapterStore, base: Path) -> None:
        self.store, self.model = store, tiny_lora(load_model(base), r=8)
        self.form = ServingForm(self.model, "default", torch.bfloat16)

    def publish(self) -> AdapterVersion:
        refill_lora(self.model, scale=0.3, seed=len(self.store.list()))
        return self.store.publish(self.form.files(), step=0)


@pytest.fixture
def shelf(llama_dir: Path, shm_dir: Path) -> Iterator[Shelf]:
    with AdapterStore(shm_dir / "store") as store:
        yield Shelf(store, llama_dir)


@pytest.fixture
def apart(llama_engine: VLLMEngine) -> Iterator[OwnedEngine]:
    """The session's engine in a thread of its own."""
    engine = OwnedEngine(llama_engine, Worker("generator", patience_s=BOUND_S))
    yield engine
    assert engine.release()
    for version in llama_engine.loaded():
        llama_engine.unload(version)


class HeldSteps:
    """Holds the engine before each step from `first` on until `may_go` says so; `events` has what it then did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: VLLMEngine, first: int = 2) -> None:
        self.reached, self.may_go, self.events = threading.Event(), threading.Event(), list[str]()
        self.threads: set[str] = set()
        step, load = StepDriver._step, VLLMEngine.load

        def held(driver: StepDriver) -> None:
            self.threads.add(threading.current_thread().name)
            if self.events.count("step") == first and not self.reached.is_set():
                self.reached.set()
                arrived(self.may_go)
            self.events.append("step")
            step(driver)

        def loading(this: VLLMEngine, version: AdapterVersion, *, held: Held | None = None) -> Any:
            self.threads.add(threading.current_thread().name)
            receipt = load(this, version, held=held)
            self.events.append(f"load {version}")
            return receipt

        monkeypatch.setattr(StepDriver, "_step", held)
        monkeypatch.setattr(VLLMEngine, "load", loading)


def ask(engine: OwnedEngine, function: Callable[[], Any]) -> Any:
    """A thread that has asked the engine for something, and its result; it waits for the engine's thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except (AssertionError, DeliveryError, EngineError) as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + BOUND_S
    while not engine.worker._calls:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return thread, results


@pytest.mark.vllm
def test_versions_are_loaded_between_the_steps_of_a_rollout(
    apart: OwnedEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = shelf.publish(), shelf.publish()
    apart.load(first)
    undisturbed = apart.generate(PROMPTS, SAMPLING, adapter=first)
    steps = HeldSteps(monkeypatch, apart._engine)
    rollout = apart.worker.submit(lambda: apart.generate(PROMPTS, SAMPLING, adapter=first))
    arrived(steps.reached)
    asking, receipts = ask(apart, lambda: apart.load(second))
    steps.may_go.set()
    groups = apart.worker.wait(rollout)
    asking.join(BOUND_S)
    assert receipts[0].proof == "slots"
    loads = [index for index, event in enumerate(steps.events) if event.startswith("load")]
    assert loads == [3], steps.events
    assert len(steps.events) - 1 >= SAMPLING.max_tokens
    assert steps.threads == {"lora_grpo-generator"}
    assert apart.loaded() == (first, second)
    assert groups == undisturbed


def spoil(version: AdapterVersion) -> None:
    config = version.path / "adapter_config.json"
    config.write_text(config.read_text() + "\n")


@pytest.mark.vllm
def test_what_goes_on_meanwhile_leaves_a_rollout_alone(
    apart: OwnedEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other versions sampled, more loaded than there is room for, its own to be unloaded, a load that fails."""
    first, second = shelf.publish(), shelf.publish()
    apart.load(first)
    apart.load(second)
    alone = [apart.generate(PROMPTS, SAMPLING, adapter=version) for version in (first, second)]
    scored = apart.logprobs([[5, 6, 7, 8]], adapter=None)
    spoiled, unproven = shelf.publish(), shelf.publish()
    spoil(spoiled)
    prover = apart._engine._residents._prover
    prove = prover.prove

    def failing(version: AdapterVersion, *args: Any) -> int:
        if version == unproven:
            raise DeliveryError("made up")
        return prove(version, *args)

    monkeypatch.setattr(prover, "prove", failing)

    def slot() -> int | None:
        return compat.slot_of(apart._engine._llm, apart._engine._find(first).request.lora_int_id)

    def meanwhile() -> Any:
        refused, held = [], slot()
        for doing in (lambda: apart.unload(first), lambda: apart.load(spoiled), lambda: apart.load(unproven)):
            with pytest.raises((EngineError, DeliveryError)) as caught:
                doing()
            refused.append(str(caught.value))
        sampled = apart.generate(PROMPTS, SAMPLING, adapter=second), apart.logprobs([[5, 6, 7, 8]], adapter=None)
        for _ in range(6):
            apart.load(shelf.publish())
        assert slot() == held, "another adapter took the slot that requests are computed with"
        return refused, sampled, apart.loaded()

    steps = HeldSteps(monkeypatch, apart._engine)
    rollout = apart.worker.submit(lambda: apart.generate(PROMPTS, SAMPLING, adapter=first))
    arrived(steps.reached)
    asking, results = ask(apart, lambda: apart.worker.call(meanwhile))
    steps.may_go.set()
    assert apart.worker.wait(rollout) == alone[0]
    asking.join(BOUND_S)
    refused, sampled, loaded = results[0]
    assert "v1 is still answering requests" in refused[0]
    assert "not the ones that were published" in refused[1]
    assert refused[2] == "made up"
    assert sampled[0] == alone[1]
    assert mean_abs_difference(sampled[1], scored) < 0.02
    assert first in loaded
    assert [version.number for version in loaded if version != first] == [8, 9, 10]


@pytest.mark.vllm
def test_base_rows_wait_for_a_rollout_where_kernels_cannot_mix_them(
    apart: OwnedEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = shelf.publish()
    apart.load(version)
    undisturbed = apart.generate(PROMPTS, SAMPLING, adapter=version)
    monkeypatch.setattr(apart._engine, "_mixes_base", False)
    steps, llm = HeldSteps(monkeypatch, apart._engine), apart._engine._llm
    rollout = apart.worker.submit(lambda: apart.generate(PROMPTS, SAMPLING, adapter=version))
    arrived(steps.reached)
    enqueue, unfinished = llm.enqueue, []

    def noting(*args: Any, **named: Any) -> Any:
        unfinished.append(llm.llm_engine.has_unfinished_requests())
        return enqueue(*args, **named)

    monkeypatch.setattr(llm, "enqueue", noting)
    asking, results = ask(apart, lambda: apart.logprobs([[5, 6, 7, 8]], adapter=None))
    steps.may_go.set()
    assert apart.worker.wait(rollout) == undisturbed
    asking.join(BOUND_S)
    assert len(results[0][0]) == 3
    assert unfinished == [False]


@pytest.mark.vllm
def test_what_the_trainer_draws_meanwhile_does_not_come_again(
    apart: OwnedEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = shelf.publish()
    apart.load(version)
    steps, before = HeldSteps(monkeypatch, apart._engine), torch.get_rng_state()
    rollout = apart.worker.submit(lambda: apart.generate(PROMPTS, SAMPLING, adapter=version))
    arrived(steps.reached)
    torch.rand(8)
    steps.may_go.set()
    apart.worker.wait(rollout)
    assert not torch.equal(torch.get_rng_state(), before), "the trainer's random numbers were taken back"


@pytest.mark.vllm
def test_a_stopped_rollout_leaves_nothing_scheduled(
    apart: OwnedEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = shelf.publish()
    apart.load(version)
    undisturbed = apart.generate(PROMPTS, SAMPLING, adapter=version)
    steps = HeldSteps(monkeypatch, apart._engine)
    rollout = apart.worker.submit(lambda: apart.generate(PROMPTS, SAMPLING, adapter=version))
    arrived(steps.reached)
    rollout.stop()
    steps.may_go.set()
    with pytest.raises(EngineError, match="told to stop"):
        apart.worker.wait(rollout)
    assert steps.events == ["step"] * 3
    assert not apart._engine._llm.llm_engine.has_unfinished_requests()
    assert apart.generate(PROMPTS, SAMPLING, adapter=version) == undisturbed


class OverAWire:
    """An engine that any thread may use, as one of servers."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self.third_loaded = engine, threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == "between_steps":
            raise AttributeError(name)
        return getattr(self._engine, name)

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> Any:
        receipt = self._engine.load(version, held=held)
        if version.number == 3:
            self.third_loaded.set()
        return receipt


def test_an_engine_for_many_threads_loads_while_it_generates(llama_dir: Path, tmp_path: Path) -> None:
    def reply(prompt: Any, version: Any, seed: int) -> str:
        if version.number == 2:
            arrived(wire.third_loaded)
        return "ab"[seed % 2] * 3

    wire = OverAWire(fake_engine(llama_dir, reply))
    with fake_trainer(llama_dir, tmp_path / "run", wire, most=2) as trainer:
        assert trainer.engine is wire
        assert workers() == {"lora_grpo-generator"}
        assert trainer.train()["steps"] == 6
    assert wire.third_loaded.is_set()
    assert workers() == set()


def test_slots_are_sized_from_the_staleness(llama_dir: Path) -> None:
    def slots(max_loras: int, most: int) -> int:
        wanted = Wanted(LoraConfig(r=2, target_modules=["q_proj"]), GRPOConfig(max_staleness=most), 4)
        room = plan_room(ModelConfig(name=str(llama_dir)), [wanted], EngineConfig(max_loras=max_loras), False, 1)
        return room.engine_config.max_loras

    assert [slots(2, most) for most in (0, 1, 2, 4)] == [2, 2, 3, 5]
    assert slots(7, 2) == 7


# What is thrown away is counted, and its prompts come again.


def fake_engine(base: Path, reply: Callable[[Any, Any, int], str] | None = None) -> FakeEngine:
    def by_seed(prompt: Any, version: Any, seed: int) -> str:
        return "".join(random.Random(seed).choices("aé", k=5))

    return FakeEngine(reply or by_seed, tokenizer=AutoTokenizer.from_pretrained(base), logprob=-5.0)


def fake_trainer(base: Path, run: Path, engine: Any = None, *, most: int = 2, **settings: Any) -> GRPOTrainer:
    fields = {"total_steps": 6, "max_staleness": most, "stall_timeout_s": BOUND_S, **settings.pop("fields", {})}
    return tiny_trainer(base, engine or fake_engine(base), run, CONFIG.replace(**fields), **settings)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Any]]]:
    """(step, prompts) of every batch that a trainer learned from."""
    batches: list[tuple[int, list[Any]]] = []

    def noting(parts: Any, config: Any, rewarded: Any, step: int) -> Any:
        batches.append((step, [group.prompt for group in rewarded.groups]))
        return learn(parts, config, rewarded, step)

    monkeypatch.setattr("lora_grpo.trainer.loop.learn", noting)
    return batches


class Once:
    """A guard's policy with one reason to go back, after `step`."""

    def __init__(self, step: int) -> None:
        self.step, self.fired = step, False

    def why(self, steps: Sequence[Any], error: Any) -> str | None:
        if self.fired or not steps or steps[-1]["step"] != self.step:
            return None
        self.fired = True
        return "once"

    def check(self, config: GRPOConfig) -> None:
        return None


def test_a_rollback_drops_what_is_under_way_and_no_prompt(
    llama_dir: Path, tmp_path: Path, trained: list[tuple[int, list[Any]]]
) -> None:
    orders = {}
    for most in (0, 2):
        guard = Guard(Once(3), to=2)
        with fake_trainer(llama_dir, tmp_path / f"run{most}", most=most, guard=guard) as trainer:
            result = trainer.train()
            assert result["steps"] == 6
            assert result["rollbacks"] == 1
            assert trainer.store.get(5).parent == 2
            lineage = [trainer.store.get(number).parent for number in range(2, trainer.version.number + 1)]
            assert lineage == [1, 2, 3, 2, 5, 6, 7, 8]
            assert trainer.store._catalog.leases.by_key.keys() == frozenset(v.number for v in trainer.engine.loaded())
        orders[most] = list(trained)
        trained.clear()
    assert orders[2] == orders[0]
    assert trainer.history[-1]["sample/dropped_rollback_total"] == 2 * 16
    assert trainer.history[-1]["sample/dropped_stale_total"] == 0
    assert max(metrics["sample/staleness_max"] for metrics in trainer.history) <= 2
    assert result["dropped_rollback"] == 2
    assert workers() == set()


def test_a_batch_that_lags_too_far_is_never_trained_on(llama_dir: Path, tmp_path: Path) -> None:
    with fake_trainer(llama_dir, tmp_path / "run", most=1) as trainer:
        trainer.sync.push(0)
        ahead = trainer.source
        assert isinstance(ahead, Ahead)
        first = ahead.take(1)
        following = ahead._ahead[0]
        ahead._generator.wait(following.groups)
        for _ in range(2):
            trainer.sync.push(1)
        taken = ahead.take(2)
        assert following.rollout.version.number == first.version.number == 1
        assert taken.version == trainer.version
        assert taken.prompts == following.rollout.prompts
        assert {completion.version for group in taken.groups for completion in group.completions} == {3}
        assert ahead.dropped == {"stale": 2, "rollback": 0}, "the late one, and what was begun behind it"
        assert ahead.metrics()["sample/dropped_stale_total"] == 2 * 16
        assert ahead.metrics()["sample/staleness_max"] == 0
        assert lag_behind(trainer.store, trainer.version, trainer.store.get(1), 2) == 2
        assert lag_behind(trainer.store, trainer.version, trainer.store.get(1), 1) is None
        assert lag_behind(trainer.store, trainer.store.get(1), trainer.version, 9) is None


def test_versions_under_way_stay_on_tmpfs(llama_dir: Path, tmp_path: Path) -> None:
    """Retention keeps one version; the one that a waiting batch came from stays until that batch is trained on."""
    with fake_trainer(llama_dir, tmp_path / "run", fake_engine(llama_dir), most=1, keep=keeping(1)) as trainer:
        trainer.sync.push(0)
        ahead = trainer.source
        assert isinstance(ahead, Ahead)
        ahead.take(1)
        ahead._generator.wait(ahead._ahead[0].groups)
        trainer.sync.push(1)
        taken = ahead.take(2)
        for version in trainer.engine.loaded()[:1]:
            trainer.engine.unload(version)
        trainer.sync._lease_loaded()
        trainer.store.flush()
        trainer.store.prune()
        assert taken.version.number == 1
        assert taken.version.path.is_dir()
        ahead.drop("rollback")
        trainer.store.prune()
        assert not taken.version.path.is_dir()


def test_a_stopped_run_is_resumed_with_the_prompts_that_no_step_took(
    llama_dir: Path, tmp_path: Path, trained: list[tuple[int, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_trainer(llama_dir, tmp_path / "whole", most=0) as whole:
        whole.train()
    order = list(trained)
    trained.clear()
    with fake_trainer(llama_dir, tmp_path / "run") as trainer:
        fail_at_update(monkeypatch, trainer, 4)
        with pytest.raises(TrainingError, match="made up"):
            trainer.train()
        assert trainer.version.step == 3
    with fake_trainer(llama_dir, tmp_path / "run") as trainer:
        trainer.resume()
        assert trainer.train()["steps"] == 6
    assert trained == [*order[:4], *order[3:]]


# How each part's end is told.


def fail_at_update(monkeypatch: pytest.MonkeyPatch, trainer: GRPOTrainer, step: int) -> None:
    update, calls = trainer.policy.update, iter(range(1, 99))

    def failing(batch: Batch, **judged: Any) -> dict[str, float]:
        if next(calls) == step:
            raise TrainingError("made up")
        return update(batch, **judged)

    monkeypatch.setattr(trainer.policy, "update", failing)


def test_a_dead_generator_ends_the_run(llama_dir: Path, tmp_path: Path) -> None:
    def reply(prompt: Any, version: Any, seed: int) -> str:
        if version.number == 3:
            raise ZeroDivisionError("made up")
        return "ab"[seed % 2] * 3

    with fake_trainer(llama_dir, tmp_path / "run", fake_engine(llama_dir, reply)) as trainer:
        with pytest.raises(EngineError, match="the generator died: ZeroDivisionError: made up") as caught:
            trainer.train()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert any(f"HEAD is v{trainer.version.number}" in note for note in caught.value.__notes__)
        assert trainer.version.step == trainer.steps_done >= 2
        trainer.store.verify(trainer.version.number)
    assert workers() == set()


def test_an_error_of_ours_keeps_its_kind_and_names_the_culprit(llama_dir: Path, tmp_path: Path) -> None:
    def rollout(prompts: Any, engine: Any, version: Any) -> list[Group]:
        return engine.generate(prompts, Sampling(n=4, max_tokens=4), adapter=None)

    with (
        fake_trainer(llama_dir, tmp_path / "run", rollout_func=rollout) as trainer,
        pytest.raises(DeliveryError, match="pass adapter=version") as caught,
    ):
        trainer.train()
    assert caught.value.__notes__[0].startswith("the generator failed; 0 steps done, and HEAD is v1")


def test_a_reward_that_fails_or_hangs_is_named(llama_dir: Path, tmp_path: Path) -> None:
    def failing(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        return share_of_low_bytes(completions) if trainer_state.global_step < 3 else [1.0]

    with (
        fake_trainer(llama_dir, tmp_path / "failing", reward_funcs=failing) as trainer,
        pytest.raises(RewardError, match="'failing' returned 1 value ") as caught,
    ):
        trainer.train()
    assert caught.value.__notes__[0].startswith("the reward failed; 2 steps done")
    assert trainer.steps_done == 2

    released = threading.Event()

    def hanging(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        if trainer_state.global_step == 3:
            released.wait(BOUND_S)
        return share_of_low_bytes(completions)

    started = time.monotonic()
    with fake_trainer(
        llama_dir, tmp_path / "hanging", reward_funcs=hanging, fields={"stall_timeout_s": 1.0}
    ) as trainer:
        with pytest.raises(RewardError, match="the reward has shown no progress for 1 s"):
            trainer.train()
        assert trainer.version.step == trainer.steps_done == 2
        # The engine's thread is not the one that hangs.
        assert trainer.engine.generate(["a"], Sampling(max_tokens=2), adapter=trainer.version)
    assert time.monotonic() - started < BOUND_S / 2
    released.set()
    assert workers() == set()


def test_a_reward_that_hangs_in_an_evaluation_is_named(llama_dir: Path, tmp_path: Path) -> None:
    released = threading.Event()

    def hanging(completions: list[str], **columns: Any) -> list[float]:
        released.wait(BOUND_S)
        return share_of_low_bytes(completions)

    with (
        fake_trainer(
            llama_dir,
            tmp_path / "run",
            reward_funcs=hanging,
            eval_dataset=ROWS[:2],
            fields={"stall_timeout_s": 0.5},
        ) as trainer,
        pytest.raises(RewardError, match="the reward has shown no progress"),
    ):
        trainer.train()
    released.set()


def test_a_generator_that_hangs_is_named_and_left_behind(llama_dir: Path, tmp_path: Path) -> None:
    released = threading.Event()

    def reply(prompt: Any, version: Any, seed: int) -> str:
        if version.number >= 2:
            released.wait(BOUND_S)
        return "ab"[seed % 2] * 3

    started = time.monotonic()
    with fake_trainer(
        llama_dir, tmp_path / "run", fake_engine(llama_dir, reply), fields={"stall_timeout_s": 1.0}
    ) as trainer:
        with pytest.raises(EngineError, match="the generator has shown no progress for 1 s"):
            trainer.train()
        head = trainer.version
        assert head.step in (trainer.steps_done, trainer.steps_done - 1)
        trainer.store.verify(head.number)
    assert time.monotonic() - started < BOUND_S / 2
    released.set()
    with AdapterStore(archive=tmp_path / "run", readonly=True) as store:
        assert store.head == head or (store.head is not None and store.head.number == head.number)


def test_a_dead_trainer_stops_the_generator(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, stopped = threading.Event(), threading.Event()

    def reply(prompt: Any, version: Any, seed: int) -> str:
        if version.number >= 2:
            held.set()
            stopped.wait(BOUND_S)
        return "ab"[seed % 2] * 3

    engine = fake_engine(llama_dir, reply)
    with fake_trainer(llama_dir, tmp_path / "run", engine, most=1) as trainer:
        update = trainer.policy.update

        def failing(batch: Batch, **judged: Any) -> dict[str, float]:
            if trainer.steps_done == 1:
                arrived(held)
                raise TrainingError("made up")
            return update(batch, **judged)

        monkeypatch.setattr(trainer.policy, "update", failing)
        with pytest.raises(TrainingError, match="made up") as caught:
            trainer.train()
        assert caught.value.__notes__ == ["the trainer failed here; 1 step done, and HEAD is v2"]
        assert trainer.version.number == 2
        stopped.set()
    assert workers() == set()
    assert engine.between_steps is None
    assert trainer.store._catalog.leases.by_key.keys() == frozenset()


def test_ctrl_c_ends_the_wait_and_the_threads(llama_dir: Path, tmp_path: Path) -> None:
    released = threading.Event()

    def reply(prompt: Any, version: Any, seed: int) -> str:
        if version.number == 2 and not released.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            released.wait(BOUND_S)
        return "ab"[seed % 2] * 3

    with fake_trainer(llama_dir, tmp_path / "run", fake_engine(llama_dir, reply)) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.version.step in (trainer.steps_done, trainer.steps_done - 1)
        trainer.store.verify(trainer.version.number)
        released.set()
    assert workers() == set()


def test_a_trainer_can_train_on_after_it_was_stopped(llama_dir: Path, tmp_path: Path) -> None:
    with fake_trainer(llama_dir, tmp_path / "run") as trainer:
        calls = iter(range(99))

        def interrupted(completions: list[str], **columns: Any) -> list[float]:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return share_of_low_bytes(completions)

        trainer.source.reward_funcs = [interrupted]
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.steps_done == 2
        assert trainer.train()["steps"] == 6
        assert [metrics["step"] for metrics in trainer.history] == [1, 2, 3, 4, 5, 6]
