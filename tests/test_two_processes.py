"""Two real processes (gloo, on the CPU) train, publish and go back as one does: DDP and accelerate's FSDP2."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_grpo.adapters.peft_form.modules import whole
from lora_grpo.adapters.peft_form.serving import Held, ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.engines.base import LoadReceipt
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.errors import DeliveryError, NoRoom
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.optimizer import build_optimizer
from lora_grpo.policy import Policy
from lora_grpo.sync import NativeSync
from lora_grpo.types import Sampling
from tests.tiny_policy import adapter_weights, config, drifted, peft_model, rollout
from tests.two_processes import TIMEOUT_S, in_two, sharded

STEPS = 5
ADVANTAGES = torch.tensor([1.0, -0.5, 0.4, 0.7, 0.9, -1.1, 0.3, 0.2, -1.2, 0.8, 0.3, 0.9, 0.0, 0.0, 0.0, 0.0])
RAGGED = {"prompt_lengths": (3, 5, 2, 9)}
KINDS = ("ddp", "fsdp2", "fsdp2-one-group")


def settings(processes: int, **changes: Any) -> Any:
    """The same optimizer batch of 16 rows (or of 8, twice a step), however many share it."""
    return config(8, gradient_accumulation_steps=2 // processes, learning_rate=1e-2, **changes)


def batches(case: str) -> Batch:
    """All 16 rows, prepared in this process with drift that depends on no process; not prepared where a rollout is at
    once its only update.

    For "bits", rows of one length: the micro-batches of two processes are then those of one, and so is every rounding.
    """
    cut = case != "bits"
    groups = rollout(prompt_lengths=(5, 5, 5, 5) if not cut else RAGGED["prompt_lengths"])
    if not cut:
        groups = [replace(g, completions=tuple(_long(completion) for completion in g.completions)) for g in groups]
    batch = Batch.from_groups(groups, ADVANTAGES)
    if case == "at-once":
        return batch
    policy = Policy(peft_model(), config(4))
    return drifted(policy.prepare(batch), policy.logprobs(batch))


def _long(completion: Any, length: int = 6) -> Any:
    ids = (completion.token_ids * length)[:length]
    return replace(completion, token_ids=ids, logprobs=(-2.0,) * length)


def half(batch: Batch, accelerator: Any) -> Batch:
    rows = torch.arange(len(batch)).chunk(2)[accelerator.process_index]
    return batch.select(rows)


def policy_of(kind: str, accelerator: Any, **changes: Any) -> Policy:
    model, chosen = peft_model(), settings(2, **changes)
    if kind == "ddp":
        return Policy(accelerator.prepare_model(model), chosen, accelerator=accelerator)
    model, optimizer = sharded(accelerator, model, build_optimizer(model, chosen), by_layer=kind == "fsdp2")
    return Policy(model, chosen, accelerator=accelerator, optimizer=optimizer)


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in policy.parameters.items()}


def moments(policy: Policy) -> list[Tensor]:
    states = policy.optimizer.state_dict()["state"]
    return [whole(value).clone() for index in sorted(states) for _, value in sorted(states[index].items())]


# What the two processes do.


def five_steps(accelerator: Any, folder: Path) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        for case, changes in CASES.items():
            policy = policy_of(kind, accelerator, **changes)
            is_sharded = isinstance(next(iter(policy.parameters.values())), DTensor)
            assert is_sharded == (kind != "ddp")
            torch.manual_seed(7 + accelerator.process_index)
            metrics = [policy.update(half(batches(case), accelerator)) for _ in range(STEPS)]
            found[kind, case] = whole_weights(policy), metrics
    return found


CASES: dict[str, dict[str, Any]] = {
    "bits": {"max_grad_norm": 0.0},
    "ragged": {"beta": 0.1, "max_grad_norm": 0.05},
    "shuffled": {"generation_batch_size": 16, "per_device_train_batch_size": 4},
    "at-once": {},
}


class Counted(TorchDispatchMode):
    """Bytes that gathering collectives leave in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if "all_gather_into_tensor" in name or "_allgather_base" in name:
            tensor = out if isinstance(out, Tensor) else args[0]
            self.bytes += tensor.numel() * tensor.element_size()
        return out


class PerProcess(FakeEngine):
    """A fake that stands for an engine in this process."""

    fails = False

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    def load(self, version: Any, *, held: Held | None = None) -> LoadReceipt:
        if self.fails:
            raise DeliveryError("the slot holds something else")
        return super().load(version, held=held)


def fake() -> PerProcess:
    return PerProcess(lambda prompt, version, seed: f"{prompt}{seed % 1000}")


def store_of(accelerator: Any, folder: Path, name: str, **kwargs: Any) -> AdapterStore | None:
    if accelerator.process_index:
        return None
    return AdapterStore(folder / name / "root", folder / name / "run", **kwargs)


def publishing(accelerator: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        policy = policy_of(kind, accelerator)
        store = store_of(accelerator, folder, kind)
        sync = NativeSync(policy.model, fake(), store, accelerator=accelerator, keep_state=lambda version: False)
        policy.logprobs(half(batches("ragged"), accelerator))
        with Counted() as counted:
            version = sync.push(step=0)
        loaded, head = [v.number for v in sync.engine.loaded()], sync.head.number
        found[kind] = counted.bytes, version.digest, loaded, head, version.path.is_dir()
        sync.close()
        if store:
            store.close()
    return found


def failing(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Each time in one process only; both have to hear of it, soon, and to go on."""
    found: dict[str, Any] = {}
    first = accelerator.process_index == 0
    policy, engine = policy_of("fsdp2", accelerator), fake()
    store = store_of(accelerator, folder, "failing")
    sync = NativeSync(policy.model, engine, store, accelerator=accelerator, optimizer=policy.optimizer)
    good = sync.push(step=0)

    def attempt(name: str) -> None:
        started = time.perf_counter()
        try:
            sync.push(step=1)
        except Exception as error:  # noqa: BLE001 - what it is, is the question
            loaded = [version.number for version in engine.loaded()]
            found[name] = type(error), str(error), sync.head.number, loaded, time.perf_counter() - started

    engine.fails = not first
    attempt("load")
    engine.fails = False
    if store:
        store._budget_bytes = 1
    attempt("publish")
    if store:
        store._budget_bytes = None
    with torch.no_grad():
        if not first:
            next(iter(policy.parameters.values())).to_local().fill_(torch.nan)
    attempt("weights")
    engine.fails = first
    started = time.perf_counter()
    try:
        sync.rollback(to=good.number)
    except Exception as error:  # noqa: BLE001 - what it is, is the question
        found["rollback"] = type(error), str(error), sync.head.number, time.perf_counter() - started
    engine.fails = False
    found["back"] = sync.rollback(to=good.number).version.number
    sync.close()
    if store:
        store.close()
    return found


def one_engine_alone(accelerator: Any, folder: Path) -> str:
    policy = policy_of("ddp", accelerator)
    store = store_of(accelerator, folder, "alone")
    try:
        NativeSync(policy.model, None if accelerator.process_index else fake(), store, accelerator=accelerator)
    except ValueError as error:
        return str(error)
    finally:
        if store:
            store.close()
    return "nothing was said"


def engine_of_the_first(accelerator: Any, folder: Path) -> list[Any]:
    """An engine that computes in neither process, as a server does not: the first one asks it for both."""
    policy, engine = policy_of("fsdp2", accelerator), None
    if not accelerator.process_index:
        engine = FakeEngine(lambda prompt, version, seed: f"{prompt}{seed % 1000}")
    store = store_of(accelerator, folder, "server")
    sync = NativeSync(policy.model, engine, store, accelerator=accelerator)
    version = sync.push(step=0)
    groups = sync.engine.generate(["a", "b", "c"], Sampling(n=2, seed=1), adapter=version)
    said = [completion.text for group in groups for completion in group.completions]
    sync.close()
    if store:
        store.close()
    return [said, [completion.version for group in groups for completion in group.completions]]


def going_back(accelerator: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        policy, batch = policy_of(kind, accelerator, lr_scheduler_type="linear"), half(batches("ragged"), accelerator)
        store = store_of(accelerator, folder, f"back-{kind}")
        sync = NativeSync(
            policy.model,
            fake(),
            store,
            accelerator=accelerator,
            optimizer=policy.optimizer,
            scheduler=policy.scheduler,
        )
        sync.push(step=0)
        seen = []
        for step in range(1, 4):
            policy.update(batch)
            sync.push(step=step)
            seen.append((whole_weights(policy), moments(policy), torch.rand(3)))
        # A forward without a backward leaves some of the parameters whole: what is written to those must not count.
        with torch.no_grad():
            policy.model(input_ids=torch.tensor([[3, 4, 5]]))
        report = sync.rollback(to=2)
        back = whole_weights(policy), moments(policy), torch.rand(3)
        policy.update(batch)
        again = whole_weights(policy), moments(policy), None
        if store:
            (store.archive / "states" / "000003").rename(folder / f"gone-{kind}")
        rounded = sync.rollback(to=3)
        found[kind] = str(report), back, seen[0], again, seen[1], rounded.weights, whole_weights(policy)
        sync.close()
        if store:
            store.close()
    return found


@pytest.fixture(scope="module")
def both() -> Iterator[list[dict[str, Any]]]:
    scenarios = {
        "alone": alone,
        "five_steps": five_steps,
        "publishing": publishing,
        "failing": failing,
        "one_engine_alone": one_engine_alone,
        "engine_of_the_first": engine_of_the_first,
        "going_back": going_back,
    }
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-test-") as folder:
        yield in_two(scenarios, Path(folder))


def alone(accelerator: Any, folder: Path) -> dict[str, Any]:
    """What one process makes of all rows; in a process of the same kind, since another may round otherwise."""
    return {case: one_process(case) for case in CASES}


# What has to come of it.


def one_process(case: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    policy = Policy(peft_model(), settings(1, **{**CASES[case], **SINGLE.get(case, {})}))
    metrics = [policy.update(batches(case)) for _ in range(STEPS)]
    return adapter_weights(policy.model), metrics


SINGLE: dict[str, dict[str, Any]] = {"shuffled": {"per_device_train_batch_size": 4}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_five_updates_are_those_of_one_process(both: list[dict[str, Any]], kind: str, case: str) -> None:
    """Rows of one length: to the bit. Else the same rows lie in other micro-batches, whose paddings round otherwise."""
    expected, metrics = both[0]["alone"][case]
    start = adapter_weights(peft_model())
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert moved > 1e-2
    for results in both:
        got, got_metrics = results["five_steps"][kind, case]
        if case == "bits":
            assert all(torch.equal(got[name], expected[name]) for name in expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-3 * moved)
        for one, other in zip(got_metrics, metrics, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_push_gathers_the_adapter_and_nothing_else(both: list[dict[str, Any]]) -> None:
    """Of the base, four times the adapter's size here, no byte; without shards, nothing at all."""
    model = peft_model()
    form = ServingForm(model, "default", torch.float32)
    form.files()
    base_bytes = sum(p.numel() for p in model.parameters() if not p.requires_grad) * 4
    assert base_bytes > 2 * form.nbytes
    for results in both:
        gathered = {kind: results["publishing"][kind][0] for kind in KINDS}
        assert gathered == {"ddp": 0, "fsdp2": form.nbytes, "fsdp2-one-group": form.nbytes}


@pytest.mark.parametrize("kind", KINDS)
def test_both_serve_what_one_process_would_publish(both: list[dict[str, Any]], kind: str, shm_dir: Path) -> None:
    with AdapterStore(shm_dir / "root", shm_dir / "run") as store:
        expected = NativeSync(peft_model(), fake(), store).push(step=0)
    for results in both:
        _, digest, loaded, head, there = results["publishing"][kind]
        assert (digest, loaded, head, there) == (expected.digest, [1], 1, True)


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("load", DeliveryError, "process 1: the slot holds something else"),
        ("publish", NoRoom, "process 0: "),
        ("weights", Exception, "process 0: .* non-finite"),
        ("rollback", DeliveryError, "process 0: the slot holds something else"),
    ],
)
def test_what_fails_in_one_fails_in_both(both: list[dict[str, Any]], what: str, kind: Any, words: str) -> None:
    """With the same error, which says where; nothing has moved, nothing of the failed version is loaded, none waits."""
    for results in both:
        found = results["failing"][what]
        assert issubclass(found[0], kind)
        assert found[0] is both[0]["failing"][what][0]
        assert re.search(words, found[1])
        assert found[2] == 1
        assert found[-1] < TIMEOUT_S / 4
        assert len(found) == 4 or found[3] == [1]
        assert results["failing"]["back"] == 1


def test_an_engine_in_one_process_only_is_refused(both: list[dict[str, Any]]) -> None:
    for results in both:
        assert "[0] of 2 processes have their own engine" in results["one_engine_alone"]


def test_a_server_is_asked_by_the_first_for_both(both: list[dict[str, Any]]) -> None:
    said, versions = both[0]["engine_of_the_first"]
    assert both[1]["engine_of_the_first"] == [said, versions]
    assert len(set(said)) == 6
    assert set(versions) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_restores_every_bit(both: list[dict[str, Any]], kind: str) -> None:
    """Weights, moments and each process's own random state; and the next update is the one that was made then."""
    for results in both:
        report, back, then, again, following, weights, rounded = results["going_back"][kind]
        assert "weights exact, optimizer restored, scheduler restored, random state restored" in report
        for got, expected in ((back, then), (again, following)):
            assert all(torch.equal(got[0][name], expected[0][name]) for name in expected[0])
            assert len(got[1]) == len(expected[1]) > 0
            assert all(torch.equal(one, other) for one, other in zip(got[1], expected[1], strict=True))
        assert not torch.equal(back[0][next(iter(back[0]))], again[0][next(iter(again[0]))])
        assert torch.equal(back[2], then[2])
        assert weights == "rounded"
        for name, tensor in rounded.items():
            torch.testing.assert_close(tensor, following[0][name], rtol=1e-6, atol=1e-8)
