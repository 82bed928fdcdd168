"""benchmarks/gpu/tune.py without a GPU: what it searches, that it times what is right, that vLLM reads what it leaves;
and the strategies that decode with it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lora_grpo.bench.strategies import load_strategy
from lora_grpo.bench.strategies.native import Native
from lora_grpo.bench.strategies.native_switched import TUNED_VARIABLE
from lora_grpo.engines import compat
from lora_grpo.errors import ConfigError, UnsupportedVersion
from tests.test_bench import subject

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "gpu"
GPU = "NVIDIA H200-SXM"
SHRINK = {"op_type": "shrink", "max_loras": 3, "batch": 64, "hidden_size": 3584, "rank": 16, "num_slices": 3}
EXPAND = {**SHRINK, "op_type": "expand", "add_inputs": True}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "tune", raising=False)
    return importlib.import_module("tune")


def kernel_module(**chosen: int) -> SimpleNamespace:
    """What vLLM chooses, whatever it is asked."""
    return SimpleNamespace(get_lora_op_configs=lambda op_type, **asked: dict(chosen))


class Kernels:
    """A layer's LoRA: asks both modules for settings, as vLLM's launchers do, and takes as long as those say."""

    def __init__(self, script: ModuleType, best: dict[str, dict[str, int]], rows: int = 64) -> None:
        self.modules = {
            "shrink": kernel_module(split_k=64, block_k=256, block_m=32, num_warps=4, num_stages=2),
            "expand": kernel_module(block_n=128, block_m=64, block_k=32, num_warps=4, num_stages=2),
        }
        self.chosen = {name: script.Chosen(module) for name, module in self.modules.items()}
        self.layer, self.x, self.best = script.Layer("qkv_proj", 3584, (3584, 512, 512)), torch.zeros(rows, 1), best

    def __call__(self) -> None:
        asked = {**SHRINK, "batch": self.x.shape[0]}
        self.last = {
            "shrink": self.modules["shrink"].get_lora_op_configs(asked.pop("op_type"), **asked),
            "expand": self.modules["expand"].get_lora_op_configs(op_type="expand", **asked, add_inputs=True),
        }

    def seconds(self, batch: Kernels) -> float:
        """1 µs, and a tenth of one more for each setting that is not the best; three stages do not compile."""
        batch()
        if any(settings["num_stages"] == 3 for settings in batch.last.values()):
            return float("inf")
        wrong = [
            name for kind, best in self.best.items() for name, value in best.items() if batch.last[kind][name] != value
        ]
        return 1e-6 * (1 + len(wrong) / 10)


def test_one_setting_after_the_other(script: ModuleType) -> None:
    seen: list[dict[str, int]] = []

    def seconds(settings: dict[str, int]) -> float:
        seen.append(settings)
        return abs(settings["a"] - 3) + 0.5 * abs(settings["b"] - 10) + 1

    best, first_s, best_s = script.descend({"a": 1, "b": 1, "c": 7}, {"a": (1, 2, 3, 4), "b": (10, 20)}, seconds)
    assert (best, first_s, best_s) == ({"a": 3, "b": 10, "c": 7}, 7.5, 1)
    assert len(seen) == len({tuple(s.items()) for s in seen}) == 6


def test_less_than_the_noise_is_no_gain(script: ModuleType) -> None:
    taken = {1: 1.0, 2: 0.99, 3: float("inf")}
    best, *_ = script.descend({"a": 1}, {"a": (2, 3)}, lambda settings: taken[settings["a"]])
    assert best == {"a": 1}


def test_it_finds_the_best_of_both_operations_and_keeps_it(script: ModuleType) -> None:
    best = {"shrink": {"split_k": 16, "num_warps": 8}, "expand": {"block_n": 64, "block_m": 16}}
    kernels, kept = Kernels(script, best), []
    rows = list(script.tune([kernels], kernels.chosen, kernels.seconds, lambda *found: kept.append(found)))
    assert [(row["layer"], row["rows"], row["operation"]) for row in rows] == [
        ("qkv_proj", 64, "shrink"),
        ("qkv_proj", 64, "expand"),
    ]
    assert rows[0]["settings"] == {"split_k": 16, "block_k": 256, "block_m": 32, "num_warps": 8, "num_stages": 2}
    assert rows[1]["settings"] == {"block_n": 64, "block_m": 16, "block_k": 32, "num_warps": 4, "num_stages": 2}
    assert [(row["stock_us"], row["tuned_us"]) for row in rows] == [(1.4, 1.2), (1.4, 1.2)]
    by_rows = {(asked["op_type"], asked["batch"]): settings for asked, settings in kept}
    assert by_rows["shrink", 64] == rows[0]["settings"]
    assert by_rows["expand", 64] == rows[1]["settings"]
    for rows_of_a_prefill in script.PREFILL_ROWS:
        assert by_rows["shrink", rows_of_a_prefill]["split_k"] == 64
    kernels()
    assert kernels.last["shrink"]["split_k"] == 64, "what was tried last must not stay"


def test_the_kernel_that_is_kept_at_one_stage_stays_there(script: ModuleType) -> None:
    module = kernel_module(num_stages=1, block_n=128)
    assert "num_stages" in script.Chosen(kernel_module(num_stages=2)).grid("expand")
    module.get_lora_op_configs.one_stage = True
    assert "num_stages" not in script.Chosen(module).grid("expand")


@pytest.mark.vllm
def test_vllm_reads_what_was_kept(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through vLLM's own reader: the settings of a question, of the nearest number of rows, of a second shape."""
    from vllm import envs
    from vllm.lora.ops.triton_ops import utils

    read = utils.get_lora_op_configs.__wrapped__
    stock = {kind: read(**asked) for kind, asked in (("shrink", SHRINK), ("expand", EXPAND))}
    folder = script.Folder(tmp_path / "tuned", GPU)
    tuned = {"shrink": {**stock["shrink"], "split_k": 16}, "expand": {**stock["expand"], "block_n": 32}}
    other = {**stock["shrink"], "split_k": 8}
    folder.keep(SHRINK, tuned["shrink"])
    folder.keep({**SHRINK, "batch": 8192}, stock["shrink"])
    folder.keep(EXPAND, tuned["expand"])
    script.Folder(tmp_path / "tuned", GPU).keep({**SHRINK, "hidden_size": 896}, other)
    monkeypatch.setattr(envs, "VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "tuned"), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(utils, "load_lora_op_config", utils.load_lora_op_config.__wrapped__)
    assert read(**SHRINK) == tuned["shrink"]
    assert read(**EXPAND) == tuned["expand"]
    assert read(**{**SHRINK, "batch": 70}) == tuned["shrink"]
    assert read(**{**SHRINK, "batch": 7000}) == stock["shrink"]
    assert read(**{**SHRINK, "hidden_size": 900}) == other


def test_the_layers_of_a_shape(script: ModuleType) -> None:
    found = {layer.name: (layer.inputs, layer.outputs) for layer in script.layers_of("qwen2.5-7b")}
    assert found == {
        "qkv_proj": (3584, (3584, 512, 512)),
        "o_proj": (3584, (3584,)),
        "gate_up_proj": (3584, (18944, 18944)),
        "down_proj": (18944, (3584,)),
    }


@pytest.mark.vllm
def test_what_is_timed_is_the_layers_lora(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On vLLM's wrapper for this device; a wrong product is not timed."""
    if not compat.is_cpu():
        pytest.skip("without a GPU")
    monkeypatch.setattr(script, "graph_seconds", None)
    batch = script.Batch(script.Layer("qkv_proj", 48, (32, 16, 16)), rows=5, rank=16, slots=2, device="cpu")
    assert batch.is_right()
    assert batch.expected.abs().mean() > 0.3
    batch.b[1][0].neg_()
    assert not batch.is_right()


def test_both_operations_are_vllms_own(script: ModuleType) -> None:
    pytest.importorskip("vllm")
    for name, module in script.operations().items():
        assert f'"{name}"' in Path(module.__file__).read_text()
        assert callable(module.get_lora_op_configs)


# The strategies.


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Subjects that were prepared, once the switch was set."""
    found: list[Any] = []
    monkeypatch.setattr(Native, "prepare", lambda self, subject, seen: found.append(subject))
    for name in ("VLLM_LORA_ENABLE_DUAL_STREAM", "VLLM_TUNED_CONFIG_FOLDER", TUNED_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return found


def prepare(name: str, device: str) -> None:
    load_strategy(name)().prepare(subject(strategy=name, device=device), lambda _: None)


@pytest.mark.vllm
def test_each_sets_its_switch(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    prepare("native-dual-stream", "cuda:0")
    assert envs.environment_variables["VLLM_LORA_ENABLE_DUAL_STREAM"]()
    (tmp_path / "H200_EXPAND_TRUE.json").write_text(json.dumps({}))
    monkeypatch.setenv(TUNED_VARIABLE, str(tmp_path))
    prepare("native-tuned", "cuda:0")
    assert envs.environment_variables["VLLM_TUNED_CONFIG_FOLDER"]() == str(tmp_path)
    assert [one.strategy for one in started] == ["native-dual-stream", "native-tuned"]


@pytest.mark.vllm
def test_what_would_measure_nothing_is_refused(started: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    from vllm import envs

    with pytest.raises(ConfigError, match=r"native-dual-stream: VLLM_LORA_ENABLE_DUAL_STREAM is for GPUs"):
        prepare("native-dual-stream", "cpu")
    with pytest.raises(ConfigError, match=r"LORA_GRPO_TUNED_KERNELS='' holds no tuned settings"):
        prepare("native-tuned", "cuda:0")
    monkeypatch.setenv(TUNED_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="holds no tuned settings"):
        prepare("native-tuned", "cuda:0")
    monkeypatch.delitem(envs.environment_variables, "VLLM_LORA_ENABLE_DUAL_STREAM")
    with pytest.raises(UnsupportedVersion, match=r"has no VLLM_LORA_ENABLE_DUAL_STREAM"):
        prepare("native-dual-stream", "cuda:0")
    assert started == []
