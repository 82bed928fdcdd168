"""The programs a user would copy run as they are: those of the README with the names and sizes of a tiny model."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.cli.train import train
from lora_grpo.config_file import load_config
from lora_grpo.demo import ensure_base
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.rewards import load_reward

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
EAGER = "max_model_len={}, enforce_eager=True"


def run_here(name: str, replaced: dict[str, str]) -> None:
    """A program in this process, with some of its words replaced, each of which it has to have."""
    text = (EXAMPLES / name).read_text()
    for old, new in replaced.items():
        assert old in text, f"{name} has no {old!r} to replace"
        text = text.replace(old, new)
    exec(compile(text, name, "exec"), {"__name__": "__main__"})


@pytest.fixture
def gsm8k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of its form in place of the hub's, and a folder of the test to run in."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n} and one.\n#### {n + 1:,}"} for n in range(64)]
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: Dataset.from_list(rows))
    monkeypatch.chdir(tmp_path)


@pytest.mark.vllm
def test_own_loop_learns_and_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # How far the steps lead depends on the sums, the adapter's first values and what is sampled.
    random.seed(0)
    torch.manual_seed(0)
    # Sums with a carry alone, which the demo's base gets wrong more often than not.
    sizes = {
        "30, 1e-4": "16, 5e-3",
        "max_tokens=4": "max_tokens=4, seed=step",
        "range(16)": "range(32)",
        "range(10, 100)": "range(18, 100, 10)",
        '"auto"': "torch.float32",
    }
    run_here("own_loop.py", {MODEL: str(ensure_base()), **sizes, "max_model_len=64": EAGER.format(64)})
    output = capsys.readouterr().out
    rewards = [float(value) for value in re.findall(r"reward ([0-9.]+);", output)]
    assert len(rewards) == 16
    assert sum(rewards[-4:]) / 4 > 0.85 > sum(rewards[:4]) / 4
    assert re.search(r"rolled back from v17 to v\d+ .* weights exact, optimizer restored", output)
    with AdapterStore(archive="runs/own-loop", readonly=True) as store:
        best = store.get("best:reward")
        assert store.head == best
        assert store.metrics(best)["reward"] == pytest.approx(max(rewards), abs=1e-3)


@pytest.mark.vllm
def test_gsm8k_program(gsm8k: None, llama_dir: Path, tmp_path: Path) -> None:
    sizes = {"steps=200": "steps=2", "batch_size=16": "batch_size=2", "length=512": "length=8"}
    run_here("gsm8k.py", {MODEL: str(llama_dir), **sizes, "max_model_len=1024": EAGER.format(256)})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    with AdapterStore(archive="runs/gsm8k", readonly=True) as store:
        assert [version.step for version in store.list()] == [0, 1, 2]
        assert "rewards/right_number/mean" in store.metrics("parent")


@pytest.mark.vllm
def test_gsm8k_file(gsm8k: None, llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["total_steps=1", "per_device_train_batch_size=2", "max_completion_length=8"]
    settings = [f"model.name={llama_dir}", "engine.max_model_len=256", "engine.enforce_eager=true"]
    train(
        EXAMPLES / "gsm8k.toml",
        [*settings, *(f"grpo.{size}" for size in sizes)],
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["run"], result["steps"], result["versions"]) == ("runs/gsm8k", 1, 2)


def test_gsm8k_program_and_file_are_one_run() -> None:
    config, text = load_config(EXAMPLES / "gsm8k.toml"), (EXAMPLES / "gsm8k.py").read_text()
    for line in (EXAMPLES / "gsm8k.toml").read_text().partition("[grpo]\n")[2].splitlines():
        name, _, value = line.partition(" = ")
        assert f"{name}={value}," in text
    assert f'"{config.model.name}"' in text
    assert f"r={config.lora.r}, lora_alpha={config.lora.lora_alpha:.0f}" in text
    assert config.data.system_prompt is not None
    assert config.data.system_prompt in text
    assert config.grpo.rows_per_step(1) == 128
    assert all(callable(load_reward(reward)) for reward in config.rewards)


@pytest.mark.vllm
def test_custom_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run_here("custom_reward.py", {"total_steps=15": "total_steps=8"})
    output = capsys.readouterr().out
    assert output.startswith("[1.0, 0.0] [1.0, 0.5]\n")
    before, after = (float(value) for value in re.findall(r"right answers ([0-9.]+)", output))
    assert after > before + 0.2
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture
def shared_engine(
    llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Programs here run on the tests' engine; what to replace in their text for that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_engine, "close", lambda: None)
    monkeypatch.setattr("lora_grpo.engines.vllm_local.VLLMEngine", lambda *_, **__: llama_engine)
    return {"str(ensure_base())": f'"{llama_dir}"'}


@pytest.mark.vllm
def test_rollback_goes_on_from_an_earlier_version(
    shared_engine: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_here("rollback.py", {**shared_engine, "batch_size=32": "batch_size=8"})
    *listed, back, parents = capsys.readouterr().out.splitlines()[-7:]
    assert [line.split()[0] for line in listed] == ["v1", "v2", "v3", "v4", "v5"]
    assert back.startswith("rolled back from v5 to v3 (step 2): weights exact, optimizer restored")
    assert parents == "{1: None, 2: 1, 3: 2, 4: 3, 5: 4, 6: 3, 7: 6}"


@pytest.mark.vllm
def test_weights_and_biases_gets_the_metrics(
    shared_engine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sizes = {"total_steps=15": "total_steps=1", "=512": "=16", "=256": "=8", "held_out_rows(256)": "held_out_rows(4)"}
    run_here("custom_reward.py", {**shared_engine, **sizes, "TRACKERS = ()": 'TRACKERS = ("wandb",)'})
    [log] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for name in (b"rewards/right_digits/mean", b"eval/reward", b"learning_rate"):
        assert name in log.read_bytes()


@pytest.mark.parametrize("name", ["one_process", "replicas", "several_hosts"])
def test_topologies_load(name: str) -> None:
    config = load_config(EXAMPLES / "topologies" / f"{name}.toml")
    assert config.grpo.rows_per_step(1) == 256
    assert len(config.engine.urls) == (0 if name == "one_process" else 2)
    assert (config.engine.store_address is not None) == (name == "several_hosts")


def test_four_processes_share_the_batch() -> None:
    config = load_config(EXAMPLES / "topologies" / "one_process.toml", ["grpo.gradient_accumulation_steps=2"])
    assert config.grpo.rows_per_step(4) == 256
