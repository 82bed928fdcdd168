"""`NativeSync` on a real engine: push, sample, check, in anybody's loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import LoadReceipt
from lora_grpo.engines.delivery.agreement import CanaryReport
from lora_grpo.engines.delivery.slots import SlotProver
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, DeliveryError, NoRoom, TrainingError
from lora_grpo.sync import NativeSync
from lora_grpo.types import Completion, Group, Sampling
from tests.tiny_models import load_model, refill_lora, tiny_lora

pytestmark = pytest.mark.vllm

PROMPTS = ["2 + 2 = ", "The sea is ", "Once upon a time"]
SAMPLED = Sampling(n=4, max_tokens=16, seed=1)
GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.fixture
def store(shm_dir: Path) -> Iterator[AdapterStore]:
    with AdapterStore(shm_dir / "store") as opened:
        yield opened


@pytest.fixture
def model(llama_dir: Path) -> Any:
    return tiny_lora(load_model(llama_dir), r=8)


@pytest.fixture
def sync(model: Any, llama_engine: VLLMEngine, store: AdapterStore) -> NativeSync:
    return NativeSync(model, llama_engine, store)


def restamped(groups: list[Group], **fields: Any) -> list[Group]:
    return [replace(group, completions=tuple(replace(c, **fields) for c in group.completions)) for group in groups]


# The loop


def test_a_users_own_loop(model: Any, llama_engine: VLLMEngine, store: AdapterStore) -> None:
    """Rewarding even token ids makes them likelier, through versions that are each proven and then sampled from."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    sync = NativeSync(model, llama_engine, store, optimizer=optimizer)
    shares = []
    for step in range(6):
        version = sync.push(step=step)
        sampling = Sampling(n=16, max_tokens=8, seed=step)
        groups = llama_engine.generate(PROMPTS, sampling, adapter=version)
        assert sync.canary(groups).verdict == "ok"
        rewards = [[sum(token % 2 == 0 for token in c.token_ids) for c in group.completions] for group in groups]
        assert {c.version for group in groups for c in group.completions} == {step + 1}
        assert (version.number, version.parent, version.step) == (step + 1, step or None, step)
        assert store.head == version
        shares.append(sum(map(sum, rewards)))
        reinforce(model, optimizer, groups, rewards)
    assert [version.number for version in store.list()] == [1, 2, 3, 4, 5, 6]
    assert shares[-1] > 1.3 * shares[0]


def reinforce(model: Any, optimizer: torch.optim.Optimizer, groups: list[Group], rewards: list[list[int]]) -> None:
    """One policy-gradient update, row by row."""
    optimizer.zero_grad()
    for group, rewards_G in zip(groups, rewards, strict=True):
        mean = sum(rewards_G) / len(rewards_G)
        for completion, reward in zip(group.completions, rewards_G, strict=True):
            ids = torch.tensor([[*group.prompt_token_ids, *completion.token_ids]])
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            (-(reward - mean) * logp[-len(completion.token_ids) :].sum() / 64).backward()
    optimizer.step()


def test_the_receipt_of_a_push(sync: NativeSync, store: AdapterStore) -> None:
    assert sync.last_receipt is None
    version = sync.push(step=3)
    receipt = sync.last_receipt
    assert receipt is not None
    assert receipt.version == version == sync.head
    assert list(receipt.seconds) == ["gather", "write", "check", "load", "prove", "promote"]
    assert all(seconds > 0 for seconds in receipt.seconds.values())
    assert receipt.total_s == pytest.approx(sum(receipt.seconds.values()))
    # r * (in + out) of q, k, v, o, gate, up and down, two layers, two bytes.
    widths = [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64]
    assert receipt.adapter_bytes == sync.adapter_bytes == 8 * sum(widths) * 2 * 2
    assert (receipt.load.proof, receipt.load.modules) == ("slots", 14)
    assert receipt.load.proven_bytes == receipt.adapter_bytes
    header = int.from_bytes((version.path / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (version.path / "adapter_model.safetensors").stat().st_size == 8 + header + receipt.adapter_bytes


def test_nothing_is_head_before_the_first_push(sync: NativeSync) -> None:
    with pytest.raises(ConfigError, match="nothing was pushed yet"):
        sync.head  # noqa: B018


def test_a_version_is_promoted_only_after_it_is_proven(
    model: Any, llama_engine: VLLMEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = NativeSync(model, llama_engine, store)
    seen: list[AdapterVersion | None] = []
    prove = SlotProver.prove

    def watched(self: SlotProver, version: AdapterVersion, *args: Any) -> int:
        seen.append(store.head)
        return prove(self, version, *args)

    monkeypatch.setattr(SlotProver, "prove", watched)
    first = sync.push(step=0)
    refill_lora(model, seed=1)
    second = sync.push(step=1)
    assert seen == [None, first]
    assert store.head == second


def test_a_version_that_is_not_proven_is_never_head(
    sync: NativeSync, model: Any, llama_engine: VLLMEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sync.push(step=0)
    receipt, answer = sync.last_receipt, llama_engine.generate(PROMPTS, GREEDY, adapter=first)
    refill_lora(model, seed=1)

    def unproven(self: SlotProver, version: AdapterVersion, *args: Any) -> int:
        raise DeliveryError(f"{version}: differs")

    with monkeypatch.context() as patched:
        patched.setattr(SlotProver, "prove", unproven)
        with pytest.raises(DeliveryError, match="v2: differs"):
            sync.push(step=1)
    assert store.head == first
    assert sync.last_receipt is receipt
    assert 2 not in {version.number for version in llama_engine.loaded() if version.path.is_relative_to(store.root)}
    assert llama_engine.generate(PROMPTS, GREEDY, adapter=first) == answer
    third = sync.push(step=1)
    assert (third.number, third.parent) == (3, 1)


def test_a_version_that_cannot_be_promoted_is_not_served(
    sync: NativeSync, llama_engine: VLLMEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sync.push(step=0)

    def full(version: AdapterVersion) -> None:
        raise NoRoom("HEAD cannot be moved")

    with monkeypatch.context() as patched:
        patched.setattr(store, "promote", full)
        with pytest.raises(NoRoom, match="HEAD cannot be moved"):
            sync.push(step=1)
    assert store.head == first
    assert [version for version in llama_engine.loaded() if version.path.is_relative_to(store.root)] == [first]
    assert sync.push(step=1).parent == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_never_leave_the_trainer(
    sync: NativeSync, model: Any, llama_engine: VLLMEngine, store: AdapterStore, value: float
) -> None:
    """A NaN in an adapter would stay in the engine's KV cache and poison every later request."""
    first = sync.push(step=0)
    answer, loaded = llama_engine.generate(PROMPTS, GREEDY, adapter=first), llama_engine.loaded()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in name)[5, 1] = value
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight holds non-finite values"):
        sync.push(step=1)
    assert (store.head, store.list(), llama_engine.loaded()) == (first, [first], loaded)
    assert llama_engine.generate(PROMPTS, GREEDY, adapter=first) == answer
    refill_lora(model, seed=1)
    assert sync.push(step=1).number == 2


def test_pushing_on_and_on_keeps_the_newest_loaded(
    sync: NativeSync, model: Any, llama_engine: VLLMEngine, store: AdapterStore
) -> None:
    for step in range(7):
        refill_lora(model, seed=step)
        sync.push(step=step)
    assert [version.number for version in llama_engine.loaded()] == [4, 5, 6, 7]


def test_a_push_after_going_back_to_the_oldest_loaded_version_keeps_it(
    sync: NativeSync, model: Any, llama_engine: VLLMEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the push fails, `HEAD` must still be served; the least recently used version makes room."""
    for step in range(4):
        refill_lora(model, seed=step)
        sync.push(step=step)
    first = store.get(1)
    sync.rollback(to=1)

    def unproven(self: SlotProver, version: AdapterVersion, *args: Any) -> int:
        raise DeliveryError(f"{version}: differs")

    with monkeypatch.context() as patched:
        patched.setattr(SlotProver, "prove", unproven)
        with pytest.raises(DeliveryError, match="v5: differs"):
            sync.push(step=4)
    assert store.head == first
    assert first in llama_engine.loaded()


# The canary


@pytest.mark.parametrize(
    ("gap", "signal", "verdict"),
    [
        (0.01, 1.0, "ok"),
        (0.5, 1.0, "ok"),
        (0.03, 0.06, "ok"),
        (0.51, 1.0, "failed"),
        (1.0, 1.0, "failed"),
        (5.0, 1.0, "failed"),
        (0.06, 0.06, "failed"),
        (0.06, 0.0, "failed"),
        (0.0, 0.0, "inconclusive"),
        (0.01, 0.05, "inconclusive"),
        (0.04, 0.04, "inconclusive"),
        (0.04, 0.06, "inconclusive"),
        (math.inf, 1.0, "failed"),
        (math.nan, 1.0, "failed"),
        (0.01, math.nan, "failed"),
    ],
)
def test_verdicts_at_a_noise_of_a_hundredth(gap: float, signal: float, verdict: str) -> None:
    """A sampler on the base has gap = signal: never "ok", at any signal."""
    assert CanaryReport(gap, signal, 0.01, tokens=1).verdict == verdict


def test_verdicts_without_noise_and_with_a_broken_one() -> None:
    assert CanaryReport(0.0, 0.0, 0.0, tokens=1).verdict == "inconclusive"
    assert CanaryReport(0.0, 1e-6, 0.0, tokens=1).verdict == "ok"
    assert CanaryReport(0.01, 1.0, math.nan, tokens=1).verdict == "failed"


def test_the_canary_passes_for_the_version_that_was_pushed(
    sync: NativeSync, model: Any, llama_engine: VLLMEngine
) -> None:
    version = sync.push(step=0)
    for temperature in (1.0, 0.7):
        sampling = Sampling(n=4, max_tokens=16, temperature=temperature, seed=1)
        groups = llama_engine.generate(PROMPTS, sampling, adapter=version)
        report = sync.canary(groups, temperature=temperature)
        assert report.verdict == "ok"
        assert report.gap < 0.1 * report.signal
        assert report.tokens == sum(len(c.token_ids) for group in groups for c in group.completions)
        assert 0 < report.noise < report.signal / 10
    greedy = llama_engine.generate(PROMPTS, GREEDY, adapter=version)
    assert sync.canary(greedy).verdict == "ok"
    with pytest.raises(ConfigError, match="pass temperature=1"):
        sync.canary(greedy, temperature=0.0)


def test_the_canary_leaves_the_model_as_it_was(sync: NativeSync, model: Any, llama_engine: VLLMEngine) -> None:
    """Parts of a model may be in another mode than the whole."""
    groups = llama_engine.generate(PROMPTS, SAMPLED, adapter=sync.push(step=0))
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    sync.canary(groups)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_fresh_adapter_equals_its_base_and_proves_nothing(
    sync: NativeSync, model: Any, llama_engine: VLLMEngine
) -> None:
    """B = 0: whether the adapter or the base was sampled from cannot be told, and is not called "ok"."""
    refill_lora(model, scale=0.0)
    report = sync.canary(llama_engine.generate(PROMPTS, SAMPLED, adapter=sync.push(step=0)))
    assert (report.verdict, report.signal) == ("inconclusive", 0.0)
    assert report.gap < 0.1


def test_completions_of_the_base_fail(sync: NativeSync, llama_engine: VLLMEngine) -> None:
    """A sampler that ignores the adapter: everything is as it should be but for the log-probs."""
    version = sync.push(step=0)
    groups = restamped(llama_engine.generate(PROMPTS, SAMPLED, adapter=None), version=version.number)
    with pytest.raises(DeliveryError, match=r"canary failed: trainer and sampler differ by .* not made by v1"):
        sync.canary(groups)


def test_completions_of_an_older_policy_fail(sync: NativeSync, model: Any, llama_engine: VLLMEngine) -> None:
    groups = llama_engine.generate(PROMPTS, SAMPLED, adapter=sync.push(step=0))
    refill_lora(model, seed=3)
    second = sync.push(step=1)
    with pytest.raises(ConfigError, match=r"completions of versions \{1\} cannot be checked against v2"):
        sync.canary(groups)
    with pytest.raises(DeliveryError, match="not made by v2"):
        sync.canary(restamped(groups, version=second.number))
    base = llama_engine.generate(PROMPTS, SAMPLED, adapter=None)
    with pytest.raises(ConfigError, match=r"versions \{None\} cannot be checked"):
        sync.canary(base)


def test_tokens_that_the_policy_did_not_sample_do_not_count(sync: NativeSync, llama_engine: VLLMEngine) -> None:
    """A multi-turn rollout holds a tool's output, with log-probs that mean nothing."""
    groups = llama_engine.generate(PROMPTS, SAMPLED, adapter=sync.push(step=0))

    def with_tool(completion: Completion) -> Completion:
        sampled = len(completion.token_ids)
        return replace(
            completion,
            token_ids=(*completion.token_ids, 9, 9, 9),
            logprobs=(*completion.logprobs, -99.0, -99.0, -99.0),
            token_mask=(True,) * sampled + (False,) * 3,
        )

    tooled = [replace(group, completions=tuple(map(with_tool, group.completions))) for group in groups]
    plain, report = sync.canary(groups), sync.canary(tooled)
    assert report.tokens == plain.tokens
    assert report.gap == pytest.approx(plain.gap, abs=1e-4)
    empty = Completion("", (), (), "stop", sync.head.number)
    with_empty = [*groups, Group(PROMPTS[0], groups[0].prompt_token_ids, (empty,))]
    assert sync.canary(with_empty).gap == pytest.approx(plain.gap, abs=1e-4)
    with pytest.raises(ConfigError, match="no sampled token"):
        sync.canary(restamped(tooled, token_ids=(9,), logprobs=(-99.0,), token_mask=(False,)))


# Export


def test_export(sync: NativeSync, model: Any, llama_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    sync.export(sync.push(step=0), tmp_path / "plain")
    again = PeftModel.from_pretrained(load_model(llama_dir), tmp_path / "plain").eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0.06)
    assert again.peft_config["default"].lora_alpha == model.peft_config["default"].lora_alpha


def test_load_receipts_add_up(sync: NativeSync, llama_engine: VLLMEngine) -> None:
    version = sync.push(step=0)
    again = llama_engine.load(version)
    assert isinstance(again, LoadReceipt)
    assert set(again.seconds) == {"check", "load", "prove"}
    assert again.proven_bytes == sync.adapter_bytes
