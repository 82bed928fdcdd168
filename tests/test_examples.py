"""The programs a user would copy run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_grpo.config_file import load_config
from lora_grpo.rewards import load_reward

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.vllm
def test_own_loop_learns_and_rolls_back() -> None:
    output = run("own_loop.py", "--steps", "12")
    rewards = [float(value) for value in re.findall(r"reward ([0-9.]+),", output)]
    assert len(rewards) == 12
    assert max(rewards) > rewards[0] + 0.1
    assert re.search(r"rolled back from v13 to v\d+ .* weights exact, optimizer restored", output)


@pytest.mark.vllm
def test_custom_reward(tmp_path: Path) -> None:
    saved = tmp_path / "adapter"
    output = run("custom_reward.py", "--steps", "8", "--run-dir", str(tmp_path / "run"), "--save", str(saved))
    before, after = (float(value) for value in re.findall(r"right answers ([0-9.]+)", output))
    assert after > before + 0.2
    assert (saved / "adapter_model.safetensors").is_file()


def test_gsm8k_settings_load() -> None:
    config = load_config(EXAMPLES / "gsm8k.toml", ["grpo.learning_rate=1e-5"])
    assert config.grpo.learning_rate == 1e-5
    assert config.grpo.rows_per_step(1) == 256
    for reward in config.rewards:
        assert callable(load_reward(reward))


@pytest.mark.parametrize("name", ["one_process", "replicas", "several_hosts"])
def test_topologies_load(name: str) -> None:
    config = load_config(EXAMPLES / "topologies" / f"{name}.toml")
    assert config.grpo.rows_per_step(1) == 256
    assert len(config.engine.urls) == (0 if name == "one_process" else 2)
    assert (config.engine.store_address is not None) == (name == "several_hosts")


def test_four_processes_share_the_batch() -> None:
    config = load_config(EXAMPLES / "topologies" / "one_process.toml", ["grpo.gradient_accumulation_steps=2"])
    assert config.grpo.rows_per_step(4) == 256
