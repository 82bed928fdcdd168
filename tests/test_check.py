"""`lora-grpo check`: what would end a run is found without training it, every time in one place, with an exit code."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_grpo.adapters.files.places import require_kept
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import RunConfig
from lora_grpo.config_file import config_of_model, load_config, names_a_model, save_config
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, NoRoom
from lora_grpo.trainer import build_trainer, room
from lora_grpo.trainer.checking import SWAPS, Finding, check_run, random_base
from tests import here
from tests.families import build
from tests.test_cli import lora_grpo

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(3)]
calls: list[list[str]] = []


def keeps_calls(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float | None]:
    calls.append(list(answer))
    return [None, -7.0][: len(prompts)]


def fails(completions: Sequence[str], **columns: Any) -> list[float]:
    raise KeyError("tariff")


def says_words(completions: Sequence[str], **columns: Any) -> list[str]:
    return ["good"] * len(completions)


@pytest.fixture
def config(llama_dir: Path, tmp_path: Path) -> RunConfig:
    """A run that would work."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return RunConfig(
        output_dir=str(tmp_path / "run"),
        model={"name": str(llama_dir), "dtype": "float32"},
        data={"train": str(tmp_path / "rows.jsonl")},
        rewards=[{"name": "exact"}],
        engine={"max_model_len": 128},
        grpo={"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        | {"max_completion_length": 16},
    )


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    values = config.model_dump()
    return RunConfig(**{**values, **{name: {**values[name], **own} for name, own in sections.items()}})


def wrong(findings: Sequence[Finding]) -> dict[str, str]:
    return {finding.what: finding.found for finding in findings if not finding.ok}


def test_without_an_engine_all_that_is_known_before_one_starts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "build_engine", lambda *arguments, **settings: pytest.fail("an engine starts"))
    before = sorted(tmp_path.rglob("*"))
    findings = list(check_run(config))
    assert wrong(findings) == {}
    found = {finding.what: finding.found for finding in findings}
    assert "3 rows, other columns: answer" in found["data"]
    assert "3 prompts of at most 4 tokens" in found["prompts"]
    assert re.match(r"8 \+ 1 versions of 0\.\d\d MiB; .* MiB are free in /dev/shm", found["room for versions"])
    assert found["rewards"] == "1 x exact"
    assert "2 prompts x 4 completions" in found["steps"]
    assert "rank 16 on 14 layers (down_proj, gate_proj, k_proj," in found["base and adapter"]
    assert found["vLLM"] == "serves LlamaForCausalLM with LoRA"
    parts = {"trainer base", "adapter and optimizer", "activations", "engine base", "adapter slots", "kv"}
    sizes = {what.removeprefix("memory: "): found[what] for what in found if what.startswith("memory: ")}
    assert sizes.keys() == parts
    # The tiny Llama's 109,760 values, in fp32 and in bf16.
    assert (sizes["trainer base"], sizes["engine base"]) == ("0.4 MiB", "0.2 MiB")
    assert found["memory"].endswith("free on cpu")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("sections", "what", "words"),
    [
        ({"engine": {"max_model_len": 18}}, "prompts", "rows.jsonl, row 0: the prompt has 4 tokens"),
        ({"data": {"system_prompt": "s"}, "grpo": {"max_prompt_length": 9}}, "prompts", "max_prompt_length=9 allows 9"),
        ({"data": {"train": "nowhere.jsonl"}}, "data", "no such data file"),
        ({"data": {"prompt_column": "question"}}, "data", "no column 'question'"),
        ({"grpo": {"num_generations": 3}}, "steps", "a step of 8 completions is not a multiple of num_generations"),
        ({"grpo": {"report_to": ["dvclive", "tensorboard"]}}, "trackers", "'dvclive' is not installed; pip install"),
        ({"guard": {"kl": 1.0}}, "steps", "needs beta > 0"),
        ({"guard": {"non_finite": True, "to": "bestest"}}, "steps", "'bestest'"),
        ({"lora": {"r": 600}}, "base and adapter", "rank 600 is above vLLM's largest max_lora_rank, 512"),
        ({"model": {"name": "/nowhere/model"}}, "base and adapter", "there is no directory /nowhere/model"),
    ],
)
def test_each_fault_is_one_finding(config: RunConfig, sections: dict[str, Any], what: str, words: str) -> None:
    found = wrong(list(check_run(changed(config, **sections))))
    assert list(found) == [what], found
    assert words in found[what]


def test_faults_are_all_told_at_once(config: RunConfig) -> None:
    wrong_twice = changed(config, data={"train": "nowhere.jsonl"}, model={"name": "/nowhere/model"})
    findings = wrong(list(check_run(wrong_twice.replace(rewards=[{"name": "exakt"}], output_dir="r"))))
    assert list(findings) == ["reward functions", "data", "base and adapter"]


def test_rewards_are_called_once_on_two_rows_and_their_values_do_not_count(config: RunConfig) -> None:
    calls.clear()
    names = ["keeps_calls", "fails", "says_words"]
    several = config.replace(rewards=[{"name": f"{__name__}:{name}"} for name in names])
    assert not wrong(list(check_run(several)))
    assert calls == []
    found = wrong(list(check_run(several, rewards=True)))
    assert calls == [["1", "2"]]
    assert list(found) == ["reward fails", "reward says_words"]
    assert "KeyError: 'tariff'" in found["reward fails"]
    assert "return a number" in found["reward says_words"]


@pytest.mark.parametrize(
    ("family", "settings", "what", "words"),
    [
        ("qwen3_moe", {}, "base and adapter", r"experts cannot .*such as target_modules=\['k_proj', 'o_proj', 'q_p"),
        ("deepseek_v3", {}, "base and adapter", r"such as target_modules=\['kv_a_proj_with_mqa', 'o_proj', 'q_a_proj"),
        ("llama4", {}, "base and adapter", r"layers\.0\.self_attn\.q_proj: vLLM reorders .* leave both out"),
        (
            "nemotron_h",
            {},
            "base and adapter",
            r"'out_proj' is incompatible .*its linear layers are down_proj, in_proj, k_",
        ),
        ("qwen3", {"target_modules": ["q_porj"]}, "base and adapter", r"no layer 'q_porj'; did you mean 'q_proj'"),
        ("falcon", {}, "vLLM", r"^[^.;]*: vLLM serves no LoRA on FalconForCausalLM; choose another base$"),
    ],
)
def test_what_no_engine_would_serve_is_known_from_the_config(
    family: str, settings: dict[str, Any], what: str, words: str, tmp_path: Path
) -> None:
    """With the nearest that it would."""
    config = config_of_model(str(build(family, tmp_path)), [])
    found = wrong(list(check_run(changed(config, lora=settings), alone=True)))
    assert list(found) == [what]
    assert re.search(words, found[what].replace(str(tmp_path), family)), found


class Kept(VLLMEngine):
    """An engine that others go on with."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.__dict__ = engine.__dict__

    def close(self) -> None:
        return None


def test_where_the_run_goes_is_looked_at(config: RunConfig, tmp_path: Path) -> None:
    found = {finding.what: finding.found for finding in check_run(config)}
    assert found["run directory"].endswith("holds no run")
    (tmp_path / "taken").touch()
    faults = wrong(list(check_run(config.replace(output_dir=str(tmp_path / "taken")))))
    assert list(faults) == ["run directory"]
    with AdapterStore(archive=tmp_path / "live"):
        faults = wrong(list(check_run(config.replace(output_dir=str(tmp_path / "live")))))
    assert list(faults) == ["run directory"]
    assert "is open in" in faults["run directory"]


@pytest.mark.vllm
def test_with_the_engine_base_probe_slots_and_three_swaps(
    config: RunConfig, llama_engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "build_engine", lambda *arguments, **settings: Kept(llama_engine))
    for findings in (
        list(check_run(config, engine=True)),
        list(check_run(config_of_model(config.model.name, ["model.dtype=float32"]), engine=True, alone=True)),
    ):
        assert wrong(findings) == {}
        found = {finding.what: finding.found for finding in findings}
        assert found["engine"].startswith("Kept")
        assert found["base match"].startswith("21 of 21 tensors equal, 100.0% of the values")
        assert found["one copy of the base"].startswith("not with this engine: the engine's base is bfloat16")
        assert "nats per token" in found["probe"]
        swaps = [found[f"swap {number}"] for number in range(1, SWAPS + 1)]
        assert all("slots: " in swap and "canary ok" in swap for swap in swaps), swaps
        assert "swap 4" not in found
    assert llama_engine.loaded() == ()
    assert not (tmp_path / "run").exists()
    # Nothing is started for a run that would end before.
    assert "engine" not in {f.what for f in check_run(changed(config, engine={"max_model_len": 18}), engine=True)}


@pytest.mark.vllm
def test_another_base_in_the_engine_is_one_finding(
    config: RunConfig, llama_engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny_models import tiny_model

    other = tiny_model("llama", tmp_path / "other", seed=1)
    monkeypatch.setattr(room, "build_engine", lambda *arguments, **settings: Kept(llama_engine))
    found = wrong(list(check_run(changed(config, model={"name": str(other)}), engine=True)))
    assert list(found) == ["engine"]
    assert "differs" in found["engine"]


def test_a_model_a_run_and_a_config_are_told_apart(config: RunConfig, tmp_path: Path) -> None:
    assert names_a_model(config.model.name)
    assert names_a_model("Qwen/Qwen2.5-0.5B")
    assert not names_a_model(str(save_config(config, tmp_path / "run").parent))
    assert not names_a_model("nowhere.toml")
    assert load_config(tmp_path / "run") == config
    assert config_of_model("org/model", ["lora.r=4", "model.dtype=float32"]).lora.r == 4


def test_the_command_has_an_exit_code_for_ci(config: RunConfig, tmp_path: Path) -> None:
    save_config(config, tmp_path / "run")
    done = here.lora_grpo("check", "run", "--rewards", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(finding["ok"] for finding in json.loads(done.stdout))
    failed = here.lora_grpo(
        "check", config.model.name, "lora.target_modules=[]", "engine.max_model_len=7", cwd=tmp_path
    )
    assert failed.returncode == 2
    failed = here.lora_grpo("check", "run", "engine.max_model_len=18", cwd=tmp_path)
    assert failed.returncode == 2
    assert "the prompt has 4 tokens" in failed.stdout


@pytest.mark.vllm
def test_a_config_without_weights_is_checked_with_random_ones(llama_dir: Path, tmp_path: Path) -> None:
    """Its tokenizer is not there either; the model's folder stays as it was, and what was drawn goes."""
    folder = tmp_path / "config alone"
    folder.mkdir()
    shutil.copy(llama_dir / "config.json", folder)
    settings = ["model.dtype=float32", "engine.max_model_len=128", "engine.gpu_memory_utilization=0.1"]
    before = set(Path(tempfile.gettempdir()).glob("lora-grpo-random-*"))
    done = lora_grpo("check", str(folder), "--random-weights", "--engine", "--json", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row["what"]: row["found"] for row in json.loads(done.stdout)}
    assert found["base and adapter"].startswith(str(folder))
    assert all("canary ok" in found[f"swap {number}"] for number in range(1, SWAPS + 1)), found
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert set(Path(tempfile.gettempdir()).glob("lora-grpo-random-*")) == before


ODD_WIDTH = (
    '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 63, "num_attention_heads": 4}'
)


@pytest.mark.parametrize("config", ['{"model_type": "t5"}', "{}", "not JSON", ODD_WIDTH, None])
def test_a_config_that_gives_no_language_model_is_one_sentence(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    said = r"(no|not a) model (can be built from its configuration|directory or hub name that can be read): "
    with pytest.raises(ConfigError, match=said), random_base(str(tmp_path)):
        pytest.fail("a model of nothing")


def test_a_config_of_values_that_do_not_fit_is_told_by_every_check_that_reads_it(tmp_path: Path) -> None:
    """transformers raises an error of its own for it, which is neither `OSError` nor `ValueError`."""
    (tmp_path / "config.json").write_text(ODD_WIDTH)
    findings = list(check_run(config_of_model(str(tmp_path), ()), alone=True))
    told = [found for found in wrong(findings).values() if "63) is not a multiple of the number of attention" in found]
    assert told
    assert all(found.startswith(f"{tmp_path} is not a model directory") and "\n" not in found for found in told)


def test_a_tmpfs_that_is_too_small_is_told_before_an_engine_starts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of nine versions only a few fit: the run would have ended at its fourth step."""
    monkeypatch.setattr(room, "build_engine", lambda *arguments, **settings: pytest.fail("an engine starts"))
    found = next(one for one in check_run(config) if one.what == "room for versions")
    size_mib = float(re.search(r"of ([\d.]+) MiB", found.found)[1])  # type: ignore[index]
    stock = shutil.disk_usage
    small = stock("/dev/shm")._replace(free=int(4 * size_mib * 2**20))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: small if "/dev/shm" in str(place) else stock(place))
    told = r"keeping 8 versions .* needs [\d.]+ MiB and /dev/shm.* has room for .*--shm-size.* or lower keep\.on_tmpfs"
    assert re.match(told, wrong(list(check_run(config)))["room for versions"])
    with pytest.raises(NoRoom, match=told):
        build_trainer(config)
    fewer = config.replace(keep=config.keep.replace(on_tmpfs=2))
    assert wrong(list(check_run(fewer))) == {}
    # Slots of a larger rank make no version larger.
    assert wrong(list(check_run(changed(fewer, engine={"max_lora_rank": 64})))) == {}


def test_versions_that_a_run_has_take_no_further_room(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on needs room for what is missing alone."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20, total=64 << 20))
    for number in range(7):
        with pytest.raises(NoRoom):
            require_kept(shm_dir, 8, 1 << 20)
        (shm_dir / "versions" / str(number)).mkdir(parents=True)
    assert require_kept(shm_dir, 8, 1 << 20).startswith("8 + 1 versions of 1.00 MiB")


def test_an_engine_without_room_for_its_probe_is_told_before_it_starts(config: RunConfig) -> None:
    tight = changed(config, engine={"max_model_len": 24}, grpo={"max_completion_length": 4})
    assert "start the engine with max_model_len=25 at least" in wrong(list(check_run(tight)))["prompts"]
