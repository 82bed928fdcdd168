"""The TRL example is a program a user would run; here it runs, on a real vLLM, until it has learnt the task."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.adapters.store import AdapterStore

pytest.importorskip("trl")
pytestmark = pytest.mark.vllm

EXAMPLE = Path(__file__).parent.parent / "examples" / "trl_grpo.py"
PAGE = EXAMPLE.parent / "docs" / "trl.md"


def run_example(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLE), "--output-dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def test_trl_learns_on_our_path(tmp_path: Path) -> None:
    """From half of the held-out sums right, greedily, to nearly all; a version a generation, each kept."""
    measured = run_example(tmp_path, "--steps", "13")
    assert measured["accuracy_before"] < 0.55
    assert measured["accuracy_after"] > 0.95
    with AdapterStore(archive=tmp_path / "native", readonly=True) as store:
        versions = store.list()
        assert [version.parent for version in versions] == [None, *(version.number for version in versions[:-1])]
        assert len(versions) == measured["steps"] + 1
        assert store.metrics(versions[-2].number)["reward"] > store.metrics(versions[0].number)["reward"] + 0.2


def test_the_same_work_on_our_trainer(tmp_path: Path) -> None:
    measured = run_example(tmp_path, "--trainer", "ours", "--steps", "5")
    assert measured["accuracy_before"] < 0.55
    assert measured["accuracy_after"] > 0.8


def test_the_programs_of_the_page_run_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the trainer itself, whose model is not here: its callbacks are called by what calls them in Trainer."""
    from transformers import TrainerControl
    from transformers.trainer_callback import CallbackHandler

    class Recording:
        def __init__(self, model: str, reward_funcs: Any, args: Any, train_dataset: Any, peft_config: Any) -> None:
            self.rewards = reward_funcs(completions=["one\ntwo\nthree", "one"], prompts=train_dataset["prompt"])
            self.handler = CallbackHandler([], None, None, None, None)
            self.add_callback, self.went_back_to, self.trained = self.handler.add_callback, [], 0

        def train(self) -> None:
            self.trained += 1

        def rollback(self, to: str) -> None:
            self.went_back_to.append(to)

    # TRL trains in bf16 by itself, which it looks for on a GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("lora_grpo.integrations.trl.NativeGRPOTrainer", Recording)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    trainer = names["trainer"]
    assert (trainer.rewards, trainer.trained) == ([1.0, 0.0], 1)
    for logs in ({"reward": 0.5}, {"loss": 0.1}, {"reward": 0.05}):
        trainer.handler.on_log(None, None, TrainerControl(), logs)
    assert trainer.went_back_to == ["best:reward"]
