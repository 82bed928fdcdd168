"""A population: each member is, to the bit, the run that it would be alone, and one member's end is no other's."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig
from lora_grpo.engines.delivery import probe
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.errors import ConfigError, RewardError, TrainingError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.metrics.log import read_metrics
from lora_grpo.trainer import GRPOTrainer, room
from lora_grpo.trainer.guards import Guard, NonFinite
from lora_grpo.trainer.population.member import Member
from lora_grpo.trainer.population.population import Population
from lora_grpo.trainer.preflight import MemberSpec, Preflight
from lora_grpo.types import Group
from tests.conftest import ENGINE_ARGS
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, moments, same, share_of_low_bytes, weights

TIMES = ("time/", "sync/", "step_time", "archive/")
LOUD: dict[str, Any] = {"init_lora_weights": False}
"""B is random too, so that every adapter is told from every other by its log-probs."""
LORA = LoraConfig(r=8, target_modules="all-linear", **LOUD)
SHORT = CONFIG.replace(total_steps=3, vllm_importance_sampling_correction=False)


def length(completions: Sequence[str], **columns: Any) -> list[float]:
    return [min(1.0, len(text) / 12) for text in completions]


def specs(folder: Path) -> list[MemberSpec]:
    """Three members that differ in all that members may differ in."""
    keep = KeepConfig(trainer_states=20)
    narrow = CONFIG.replace(
        seed=4,
        total_steps=3,
        reward_weights=(0.5, 2.0),
        temperature=0.8,
        num_generations=2,
        generation_batch_size=8,
        per_device_train_batch_size=4,
        max_completion_length=9,
        num_iterations=2,
    )
    attention = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, **LOUD)
    with_kl = CONFIG.replace(seed=5, total_steps=2, beta=0.1, learning_rate=5e-3)
    return [
        MemberSpec(
            folder / "all-layers", share_of_low_bytes, CONFIG.replace(total_steps=3), ROWS, peft_config=LORA, keep=keep
        ),
        MemberSpec(
            folder / "attention", [length, share_of_low_bytes], narrow, ROWS[:10], peft_config=attention, keep=keep
        ),
        MemberSpec(
            folder / "kl", share_of_low_bytes, with_kl, ROWS[5:], eval_dataset=ROWS[:3], peft_config=LORA, keep=keep
        ),
    ]


def plain(folder: Path, **changes: Any) -> MemberSpec:
    """A member for a fake engine."""
    spec = MemberSpec(folder, share_of_low_bytes, SHORT, ROWS, peft_config=LORA, keep=KeepConfig(trainer_states=20))
    return replace(spec, **changes)


@pytest.fixture(scope="module")
def base(llama_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(llama_dir), dtype="float32")


@pytest.fixture(scope="module")
def engine(llama_dir: Path) -> Iterator[Any]:
    from lora_grpo.engines.vllm_local import VLLMEngine

    engine = VLLMEngine(llama_dir, max_lora_rank=8, max_loras=3, dtype="float32", **ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.fixture
def fake(llama_dir: Path) -> FakeEngine:
    return fake_engine(llama_dir)


def alone(base: ModelConfig, engine: Any, spec: MemberSpec) -> GRPOTrainer:
    return GRPOTrainer(base, **spec.arguments(), engine=engine, view=False)


def facts(trainer: GRPOTrainer) -> tuple[Any, ...]:
    """All that a run has come to, without what it took."""
    steps = [{name: value for name, value in step.items() if not name.startswith(TIMES)} for step in trainer.history]
    return [version.digest for version in trainer.store.list()], steps, [one.rows for one in trainer.evaluations]


def require_as_alone(base: ModelConfig, engine: Any, trainer: GRPOTrainer, spec: MemberSpec) -> None:
    with alone(base, engine, spec) as lone:
        lone.train()
        assert facts(trainer) == facts(lone)
        assert same(weights(trainer), weights(lone))
        assert same(moments(trainer), moments(lone))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Every later call of `owner.name`: its positional arguments and what it returned."""
    calls, original = [], getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((args, kwargs, result))
        return result

    monkeypatch.setattr(owner, name, noting)
    return calls


def test_each_member_is_the_run_that_it_would_be_alone(
    base: ModelConfig, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs, matches = (counted(monkeypatch, probe, name) for name in ("run_probe", "match_base"))
    with Population(base, specs(tmp_path / "together"), engine=engine) as population:
        with monkeypatch.context() as spying:
            batches = counted(spying, engine, "generate")
            apart = distances(spying, engine, population)
            members = population.train()
        assert [member.state for member in members] == ["finished"] * 3
        assert (len(proofs), len(matches)) == (2, 1)  # of two forms on one base
        mixed = [batch for batch in batches if isinstance(batch[1]["adapter"], list)]
        assert [len({version.path for version in asked["adapter"]}) for _, asked, _ in mixed] == [3, 3, 2]
        assert len(apart) == 3 * (16 + 8) + 2 * 16
        assert max(own for own, _ in apart) < 1e-3 < 0.01 < min(other for _, other in apart)
        for member, spec in zip(members, specs(tmp_path / "alone"), strict=True):
            require_as_alone(base, engine, member.runs, spec)


def distances(monkeypatch: pytest.MonkeyPatch, engine: Any, population: Population) -> list[tuple[float, float]]:
    """Of every completion of every later joint batch: how far its log-probs are from those that its own member's model
    computes, and how far from those of the nearest other member's; mean nats per token."""
    found: list[tuple[float, float]] = []
    generate = engine.generate

    def measured(prompts: Any, sampling: Any, *, adapter: Any) -> Any:
        groups = generate(prompts, sampling, adapter=adapter)
        if isinstance(adapter, list):
            for owner in population.running:
                own = [group for group, version in zip(groups, adapter, strict=True) if version == owner.runs.version]
                found.extend(from_models(owner, population.running, own))
        return groups

    monkeypatch.setattr(engine, "generate", measured)
    return found


def from_models(owner: Member, members: Sequence[Member], groups: Sequence[Group]) -> Iterator[tuple[float, float]]:
    made = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
    rows, starts = [[*prompt, *one.token_ids] for prompt, one in made], [len(prompt) for prompt, _ in made]
    temperature = owner.runs.config.temperature
    scored = {
        member.name: teacher_logprobs(member.runs.model, rows, starts=starts, temperature=temperature)
        for member in members
    }
    for row, (_, one) in enumerate(made):
        gaps = {name: mean_abs_difference([of[row]], [one.logprobs]) for name, of in scored.items()}
        yield gaps.pop(owner.name), min(gaps.values(), default=math.inf)


def test_a_killed_population_goes_on_as_if_nothing_had_happened(base: ModelConfig, engine: Any, tmp_path: Path) -> None:
    """Killed by SIGKILL while the second member's second step is scored: the first has published that step."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.tiny_population", base.name, str(folder)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr[-3000:]
    with Population(base, specs(folder), engine=engine) as population:
        population.resume()
        next(population.rounds())
        assert [member.runs.steps_done for member in population.members] == [3, 2, 2]
        population.train()
        for member, spec in zip(population.members, specs(tmp_path / "alone"), strict=True):
            require_as_alone(base, engine, member.runs, spec)


def poisoned_at(step: int, victim: Callable[[], GRPOTrainer]) -> Any:
    """A reward that makes a weight of `victim` infinite, once."""
    done = []

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        if trainer_state.global_step == step and not done:
            done.append(step)
            next(iter(victim().policy.parameters.values())).data.fill_(float("inf"))
        return share_of_low_bytes(completions)

    return reward


def test_a_members_failure_is_its_own(base: ModelConfig, fake: FakeEngine, tmp_path: Path) -> None:
    def raises(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        if trainer_state.global_step == 2:
            raise ValueError("no more rewards")
        return share_of_low_bytes(completions)

    def own(prompts: Any, engine: Any, version: Any) -> Any:
        raise OSError("the tool is gone")

    folder = tmp_path / "together"
    given = [
        plain(folder / "raises", reward_funcs=raises),
        plain(folder / "nan", reward_funcs=poisoned_at(2, lambda: population.members[1].runs)),
        plain(folder / "healthy"),
        plain(folder / "guarded", reward_funcs=poisoned_at(2, lambda: population.members[3].runs), guard=GUARD),
        plain(folder / "own-rollouts", rollout_func=own),
    ]
    with Population(base, given, engine=fake) as population:
        raised, nan, healthy, guarded, own_rollouts = population.train()
        assert isinstance(raised.error, RewardError)
        assert isinstance(nan.error, TrainingError)
        assert isinstance(own_rollouts.error, OSError)
        assert own_rollouts.why == "OSError: the tool is gone"
        states = [member.state for member in population.members]
        assert states == ["failed", "failed", "finished", "finished", "failed"]
        assert guarded.runs.rollbacks == 1
        assert guarded.runs.steps_done == 3
        assert raised.trainer is None
        assert len(raised.history) == 1
        require_as_alone(base, fake, healthy.runs, plain(tmp_path / "healthy"))
        lone = plain(tmp_path / "guarded", reward_funcs=poisoned_at(2, lambda: trainers[0]), guard=GUARD)
        trainers = [alone(base, fake, lone)]
        with trainers[0] as trainer:
            trainer.train()
            assert facts(trainer) == facts(guarded.runs)


GUARD = Guard(NonFinite(), learning_rate_factor=0.5)


def test_a_batch_that_fails_is_sampled_member_by_member(
    base: ModelConfig, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = fake.generate

    def fails_for_odd_prompts(prompts: Sequence[Any], sampling: Any, *, adapter: Any) -> Any:
        if any("odd" in getattr(prompt, "prompt", prompt) for prompt in prompts):
            raise MemoryError("these rows do not fit")
        return generate(prompts, sampling, adapter=adapter)

    monkeypatch.setattr(fake, "generate", fails_for_odd_prompts)
    odd = [{"prompt": "an odd prompt"}] * 4
    with Population(base, [plain(tmp_path / "odd", train_dataset=odd), plain(tmp_path / "even")], engine=fake) as runs:
        runs.train()
        assert [member.state for member in runs.members] == ["failed", "finished"]
        assert isinstance(runs.members[0].error, MemoryError)
    told = [event["text"] for event in read_metrics(tmp_path / "even") if event["event"] == "message"]
    assert "the batch of all members failed, so each samples alone: these rows do not fit" in told
    only = [plain(tmp_path / "again", train_dataset=odd)]
    with Population(base, only, engine=fake) as runs, pytest.raises(MemoryError):
        runs.train()


def test_members_wait_are_stopped_and_added(base: ModelConfig, fake: FakeEngine, tmp_path: Path) -> None:
    given = [plain(tmp_path / name) for name in ("first", "second", "third")]
    with Population(base, given, engine=fake, at_once=2) as population:
        first, second, _ = population.members
        rounds = population.rounds()
        next(rounds)
        assert [member.state for member in population.members] == ["running", "running", "waiting"]
        population.stop(first, "worst of its rung")
        assert first.trainer is None
        assert not [v for v in fake.loaded() if "first" in str(v.path)]
        population.add(plain(tmp_path / "fourth", config=SHORT.replace(total_steps=1)))
        assert [len(population.running) for _ in rounds] == [2, 1, 0]
        assert [member.state for member in population.members] == ["stopped", *["finished"] * 3]
        assert first.why == "worst of its rung"
        assert len(first.history) == 1
        assert second.result is not None
        with pytest.raises(ConfigError, match="second is finished"):
            population.stop(second, "late")
    with Population(base, [given[0]], engine=fake) as population:
        population.resume()
        population.train()
        require_as_alone(base, fake, population.members[0].runs, plain(tmp_path / "alone"))


def test_a_members_turn_is_its_own_random_state(base: ModelConfig, fake: FakeEngine, tmp_path: Path) -> None:
    with Population(base, [plain(tmp_path / "a"), plain(tmp_path / "b")], engine=fake) as population:
        next(population.rounds())
        drawn = []
        for member in population.members:
            random.seed(0)
            with member.turn():
                drawn.append(random.random())
            assert random.random() == random.Random(0).random()
        assert drawn[0] == drawn[1] != random.Random(0).random()  # of one seed, and not of what others drew


def test_a_rollback_from_outside_is_in_the_members_turn(base: ModelConfig, fake: FakeEngine, tmp_path: Path) -> None:
    """Its random state goes back with it, and nobody else's does, whether the caller thought of `turn` or not."""
    drawn = []
    for name in ("bare", "in turn"):
        with Population(base, [plain(tmp_path / name / "a")], engine=fake) as population:
            rounds = population.rounds()
            for _ in range(2):
                next(rounds)
            [member] = population.members
            torch.manual_seed(7)
            outside = torch.get_rng_state()
            if name == "bare":
                assert member.runs.rollback(1).random_state == "restored"
            else:
                with member.turn():
                    member.runs.rollback(1)
            assert torch.equal(torch.get_rng_state(), outside)
            with member.turn():
                drawn.append((torch.rand(4).tolist(), random.random()))
    assert drawn[0] == drawn[1]


def test_what_cannot_be_a_member_is_refused_before_anything_starts(
    base: ModelConfig, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, *given: MemberSpec, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            Population(base, given, **{"engine": fake, **settings})
        assert not list(tmp_path.iterdir())

    run = tmp_path / "run"
    refused("needs at least one member")
    for at_once in ("all", "2", 0, 2.5):
        refused(f"at_once={at_once!r} must be a whole number", plain(run), at_once=at_once)
    refused("max_staleness", plain(run, config=CONFIG.replace(max_staleness=1)))
    refused("is already a member", plain(run), plain(run))
    refused("train_dataset is missing", plain(run, train_dataset=None))
    refused("pass peft_config", plain(run, peft_config=None))
    refused("'dvclive' is not installed", plain(run), plain(tmp_path / "b", config=CONFIG.replace(report_to="dvclive")))
    once = SHORT.replace(gradient_checkpointing=False)
    needed = room.plan_room(base, [Preflight(base, plain(run, config=once)).wanted], EngineConfig(), False, 1)
    more_bytes = 2 * needed.memory.adapter_and_optimizer_bytes + needed.memory.adapter_slots_bytes // 2
    monkeypatch.setattr(room, "available_memory", lambda device: needed.memory.total_bytes + more_bytes)
    refused(
        "4 members take .* holds 3 of them: pass at_once=3",
        *(plain(tmp_path / str(index), config=once) for index in range(4)),
        engine=None,
        share_base_weights=False,
    )


def test_the_engine_is_sized_for_all_members(
    base: ModelConfig, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(model: Any, config: EngineConfig, targets: list[str], **settings: Any) -> FakeEngine:
        asked.append((config.max_loras, config.max_lora_rank, targets))
        return fake

    monkeypatch.setattr("lora_grpo.trainer.room.build_engine", build)
    given = [
        plain(tmp_path / f"{layer}-{rank}", peft_config=LoraConfig(r=rank, target_modules=[layer]))
        for layer, rank in (("q_proj", 4), ("v_proj", 16), ("q_proj", 8))
    ]
    with Population(base, given) as population:
        assert asked == [(3, 16, ["q_proj", "v_proj"])]
        with pytest.raises(ConfigError, match="started for q_proj, v_proj; give a member with those layers"):
            population.add(plain(tmp_path / "more", peft_config=LORA))
        assert len(population.members) == 3


def test_an_engine_with_too_few_places_samples_members_in_turn(
    base: ModelConfig, fake: FakeEngine, tmp_path: Path
) -> None:
    small = FakeEngine(lambda prompt, version, seed: "ab"[seed % 2] * 5, tokenizer=fake.tokenizer, max_cpu_loras=2)
    once = SHORT.replace(total_steps=1)
    with Population(base, [plain(tmp_path / name, config=once) for name in "abc"], engine=small) as population:
        population.train()
        assert [member.state for member in population.members] == ["finished"] * 3
