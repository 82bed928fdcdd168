"""What of the suite concerns a GPU, as far as arithmetic and fakes can show it."""

from __future__ import annotations

import gc
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lora_grpo.bench import fidelity, host, runner, serving, shapes, sync
from lora_grpo.bench import strategy as seam
from lora_grpo.bench.joining import break_even
from lora_grpo.bench.plan import NATIVE, Cell, Settings, Subject, plan_parts
from lora_grpo.bench.report import findings
from lora_grpo.bench.runner import Partial, Runner, load
from lora_grpo.bench.schema import TOLERANCE
from lora_grpo.bench.strategy import Synced, Trainer, measure_memory
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import teacher_logprobs
from tests.test_bench import decode_row, document, subject, sync_row

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_model("tiny", tmp_path_factory.mktemp("shapes") / "tiny")


def settings_of(part: str, shape: str, **changes: Any) -> Settings:
    return plan_parts(part, None, {"shape": shape, "device": "cuda:0", "max_model_len": 1024, **changes})[part]


# Room.

BASE_GIB = {"qwen2.5-0.5b": 0.92, "qwen2.5-1.5b": 2.88, "qwen2.5-7b": 14.19}
"""In bf16; in fp32 it is twice that."""
PRISTINE_GIB = {"qwen2.5-0.5b": 0.67, "qwen2.5-1.5b": 2.44, "qwen2.5-7b": 12.16}
"""merge-fold's copy of the linear layers."""
SAVED_GIB = {"qwen2.5-0.5b": 5.7, "qwen2.5-1.5b": 12.0, "qwen2.5-7b": 26.2}
"""For the backward pass of 8 rows of 512 tokens without checkpointing, measured with autograd's hooks on the CPU."""
LAYERS = {"qwen2.5-0.5b": 24, "qwen2.5-1.5b": 28, "qwen2.5-7b": 28}
HIDDEN = {"qwen2.5-0.5b": 896, "qwen2.5-1.5b": 1536, "qwen2.5-7b": 3584}
LOGITS_GIB = 0.58
"""bf16, of 8 rows of 257 tokens."""
ADAPTER_GIB = 0.6
"""At r=16, 7B: fp32 weights, gradients and two moments."""
CUDA_GIB = 1.2
"""Context, workspaces and graphs of one process, outside vLLM's share."""


def training_gib(shape: str) -> float:
    """With checkpointing: the layers' inputs, one layer computed again and its gradients, logits and two gradients."""
    inputs = LAYERS[shape] * 8 * 512 * HIDDEN[shape] * 2 / GIB
    return inputs + 2 * SAVED_GIB[shape] / LAYERS[shape] + 3 * LOGITS_GIB + ADAPTER_GIB


GPUS = [*((shape, 139) for shape in BASE_GIB), ("qwen2.5-1.5b", 40), ("qwen2.5-7b", 79)]


@pytest.mark.parametrize("part", ["sync", "memory", "decode", "step", "rollback"])
@pytest.mark.parametrize(("shape", "gpu_gib"), GPUS)
def test_everything_that_is_alive_at_once_fits(part: str, shape: str, gpu_gib: int) -> None:
    """Merge-fold with its trainer, engine, pristine copy and, in a step, what training takes; before it the reference.

    So a 7B fits an H100, of whose 80 GB 79 GiB are there.
    """
    sizes = {"free": (gpu_gib - 1) * GIB, "total": gpu_gib * GIB}
    settings = settings_of(part, shape, strategies=(NATIVE, "merge-fold"))
    share = host.engine_share(part, settings, host.measure_model(shape, None), sizes)
    worker = BASE_GIB[shape] + share * gpu_gib + CUDA_GIB + (training_gib(shape) if part == "step" else 0)
    assert worker + PRISTINE_GIB[shape] < gpu_gib - 1
    assert 3 * BASE_GIB[shape] + CUDA_GIB < gpu_gib - 1
    assert share * gpu_gib > BASE_GIB[shape] + host.KV_CACHE_BYTES / GIB


def test_the_pristine_copy_counts_where_it_is_made() -> None:
    model, sizes = host.measure_model("qwen2.5-7b", None), {"free": 45 * GIB, "total": 48 * GIB}
    without = settings_of("rollback", "qwen2.5-7b", strategies=(NATIVE, "merge-trl"), truth=False)
    assert host.engine_share("rollback", without, model, sizes) > 0
    fold = without.replace(strategies=(NATIVE, "merge-fold"))
    with pytest.raises(ConfigError, match=r"needs about \d+\.\d GiB on cuda:0, where 45\.0 are free"):
        host.engine_share("rollback", fold, model, sizes)


def test_fidelity_counts_two_workers_and_memory_one() -> None:
    model = host.measure_model("qwen2.5-7b", None)
    cpu = {"shape": "qwen2.5-7b"}
    of = {part: host.needed_bytes(part, plan_parts(part, None, cpu)[part], model) for part in ("fidelity", "memory")}
    alone = plan_parts("fidelity", None, {**cpu, "strategies": (NATIVE,)})["fidelity"]
    assert of["fidelity"] - host.needed_bytes("fidelity", alone, model) > 4 * model["parameters"]
    assert of["memory"] < host.needed_bytes("sync", plan_parts("sync", None, cpu)["sync"], model)


def test_a_step_trains_with_checkpoints_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}
    monkeypatch.setattr(serving, "_step", lambda *_: dict.fromkeys(serving.PHASES, 0.0))
    for device in ("cpu", "cuda:0"):
        monkeypatch.setattr(
            serving,
            "Policy",
            lambda model, config, device=device: seen.update({device: config.gradient_checkpointing}),
        )
        strategy: Any = SimpleNamespace(trainer=SimpleNamespace(model=None), subject=subject(device=device))
        serving.measure_steps(strategy, Settings(step_rows=8, prompt_tokens=4, step_tokens=4, group=4, repeat=2))
    assert seen == {"cpu": False, "cuda:0": True}


class FakeWorker:
    """Notes by strategy what is done."""

    done: dict[str, list[Any]]

    def __init__(self, log: Path, *, alone: bool = False) -> None: ...

    def close(self) -> None: ...

    def do(self, work: Any, **arguments: Any) -> None:
        if work is load:
            self.mine = self.done[arguments["subject"].strategy] = []
        else:
            self.mine.append(work)


def test_a_worker_that_lives_on_gives_its_memory_back_after_each_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: dict[str, list[Any]] = {}
    monkeypatch.setattr(FakeWorker, "done", done, raising=False)
    monkeypatch.setattr(runner, "WorkerProcess", FakeWorker)
    native, other = subject(), subject(strategy="merge-trl")
    run = Runner(tmp_path / "log", lambda *_: None, alive_at_once=2)
    pair = Cell("sync/x", "sync", sync.measure, (native, other), order=(0, 1, 1, 0))
    truth = Cell("truth/x", "truth", fidelity.truth, (native,))
    assert run.run([pair, truth], Partial(tmp_path / "partial.json", {}, {}, 0.0)) == []
    assert done["merge-trl"] == [sync.measure, sync.measure, runner.give_back]
    assert done[NATIVE] == [*done["merge-trl"], fidelity.truth, runner.give_back]


def test_giving_back_empties_the_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for device in ("cpu", "cuda:0"):
        strategy: Any = SimpleNamespace(subject=subject(device=device))
        runner.give_back(strategy)
    assert emptied == [True]


class Served:
    """A strategy that serves what its trainer has."""

    remember_pushed = False

    def __init__(self, of: Subject) -> None:
        self.subject, self.trainer = of, Trainer(of)
        self.base_logprobs = self.logprobs(of.sequences())

    def same_bits(self) -> None: ...

    def sync(self) -> Synced:
        return Synced({}, {})

    def logprobs(self, sequences: Any) -> list[list[float]]:
        return teacher_logprobs(self.trainer.model, sequences)

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        (module,) = [module for module in self.trainer.modules if module.path == path]
        return base_OI + self.trainer.update_of(module)


def test_no_reference_outlives_what_it_was_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as much of a GPU as two bases, and the worker lives on beside the next pair."""
    made: list[weakref.ref[Any]] = []

    class Noted(fidelity.Reference):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self.model))

    monkeypatch.setattr(fidelity, "Reference", Noted)
    strategy: Any = Served(subject(tiny))
    oracle = fidelity.oracle(subject(tiny))
    gc.collect()
    assert [reference() for reference in made] == [None]
    (found,) = fidelity.truth(strategy, **oracle)
    assert found["error_nats"] <= TOLERANCE * found["noise_nats"]
    assert found["signal_nats"] > 2 * TOLERANCE * found["noise_nats"]
    few = Settings(repeat=1, learning_rates=(1e-4,), updates=(1,), cycles=(1,))
    fidelity.measure(strategy, few)
    assert fidelity.drift(strategy, few)[0]["max_abs"] == 0
    gc.collect()
    assert len(made) == 3
    assert all(reference() is None for reference in made)


def test_a_reference_computes_with_new_weights_and_holds_none(tiny: Path) -> None:
    """Halved weights halve what a layer adds; nothing but the layer in hand is there twice, and nothing is copied."""
    reference = fidelity.Reference(str(tiny), "cpu")
    path = "model.layers.1.mlp.down_proj"
    places = {name: p.data_ptr() for name, p in reference.model.named_parameters()}
    tokens = subject(tiny).sequences()
    base = reference.logprobs(tokens)
    assert all(p.dtype == torch.float32 for p in reference.model.parameters())
    module: Any = SimpleNamespace(path=path)
    with reference.weights([module], lambda _, weight_OI: weight_OI / 2):
        halved = reference.logprobs(tokens)
        assert {name: p.data_ptr() for name, p in reference.model.named_parameters()} == places
    with torch.no_grad():
        reference.weight(path).div_(2)
    assert reference.logprobs(tokens) == halved != base


# What is measured.


def test_mapped_files_are_no_part_of_what_cuda_has_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native peaks 100 bytes above its levels on a GPU, whatever version files are mapped into the process."""
    monkeypatch.setattr(seam, "mapped", lambda folders: 70)
    monkeypatch.setattr(seam, "forget_peaks", lambda device: None)
    monkeypatch.setattr(seam, "peak", lambda device: (1100, None))
    monkeypatch.setattr(seam, "settled_level", lambda device: 1)
    levels = SimpleNamespace(start=0, last=1000, grown={"trainer": 400, "engine": 600})
    what = {"trainer": SimpleNamespace(base_bytes=1), "renew": Mock(), "drop_base": Mock(), "folder": Path("nowhere")}
    found = {}
    for device in ("cpu", "cuda:0"):
        strategy: Any = SimpleNamespace(**what, subject=subject(device=device), levels=levels)
        (found[device],) = measure_memory(strategy)
    assert (found["cuda:0"]["sync_bytes"], found["cuda:0"]["peak_bytes"]) == (100, 1100)
    assert (found["cpu"]["sync_bytes"], found["cpu"]["peak_bytes"]) == (30, 1030)


def test_decoding_is_greedy_on_a_gpu() -> None:
    """A seed of each row's own is a loop over rows in vLLM's sampler, as slow for the base as for an adapter."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Subject, "fresh_prompts", lambda *_: [[1]])
        for device in ("cpu", "cuda:0"):
            strategy: Any = SimpleNamespace(
                generate=lambda prompts, sampling: asked.append(sampling), subject=subject(device=device)
            )
            serving.generate_seconds(strategy, 1, 1, 5)
    assert [(sampling.temperature, sampling.max_tokens) for sampling in asked] == [(1.0, 5), (0.0, 5)]
    assert all(sampling.ignore_eos for sampling in asked)


def test_training_is_counted_alike_on_both_sides_of_a_step() -> None:
    """Native generates 2 s and syncs 0, the merge 1 s and 0.5; that the merge's trainer had a better day is noise."""

    def done(strategy: str, generate: float, train: float, sync: float) -> dict[str, Any]:
        return {"strategy": strategy, "result": {"generate": [generate], "train": [train], "sync": [sync]}}

    cell = {
        "labels": {"shape": "tiny", "rows": 8, "prompt_tokens": 8, "completion_tokens": 8},
        "rounds": [
            done(NATIVE, 2.0, 9.0, 0.0),
            done("merge-fold", 1.0, 6.0, 0.5),
            done("merge-fold", 1.0, 7.0, 0.5),
            done(NATIVE, 2.0, 8.0, 0.0),
        ],
    }
    native, merge = serving.step_rows(cell)
    assert (native.train_s, merge.train_s) == (7.5, 7.5)
    assert (native.step_s, merge.step_s) == (9.5, 9.0)
    assert merge.ratio_to_native == pytest.approx(9.0 / 9.5)
    assert merge.serving_ratio_to_native == 0.75
    made = document([], [])
    made.step = [native, merge]
    assert findings(made) == ["- Step, tiny, 8 rows of 8 tokens: native 9,500 ms, merge-fold 9,000 ms (0.947)."]
    made.step = [native.model_copy(update={"rows": 1})]
    assert findings(made) == ["- Step, tiny, 1 row of 8 tokens: native 9,500 ms."]


@pytest.mark.parametrize(
    ("strategy", "device", "loss_s"),
    [("merge-fold", "cuda:0", 0.002), ("merge-fold", "cpu", None), ("merge-touched", "cpu", 0.002)],
)
def test_a_merge_decodes_like_any_other_where_nothing_is_prepacked(
    strategy: str, device: str, loss_s: float | None
) -> None:
    syncs = [sync_row(NATIVE, 0.02, 0.02), sync_row(strategy, 1.02, 0.02)]
    own, other = decode_row(strategy, 0.008, 0.012), decode_row("merge-trl", 0.010, 0.012)
    found = [row.decode_loss_s_per_token for row in break_even(syncs, [other], device)]
    assert found == ([] if loss_s is None else [pytest.approx(loss_s)])
    assert break_even(syncs, [other, own], device)[0].decode_loss_s_per_token == pytest.approx(0.004)


def test_native_and_what_decodes_like_no_merge_do_not_break_even() -> None:
    syncs = [sync_row(name, 1.0, 0.5) for name in ("native-disk", "native again", "by-hand")]
    assert break_even(syncs, [decode_row(name, 1.0, 1.0) for name in (NATIVE, "native again")], "cpu") == []


# Where it was measured.


def test_the_environment_names_the_commit_before_any_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host.COMMIT, "abc1234")
    assert host.commit() == host.card("cpu")["commit"] == "abc1234"
    monkeypatch.delenv(host.COMMIT)
    assert host.commit() != "abc1234"

    def absent(*_: Any, **__: Any) -> Any:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert host.commit() is None
    assert "commit" not in host.card("cpu")
