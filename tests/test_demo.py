"""The demo as a newcomer runs it: one command, one JSON line, and a run directory that can be recomputed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

KEYS = {
    "accuracy_before",
    "accuracy_after",
    "steps",
    "seconds",
    "sync_median_s",
    "logprob_gap_mean",
    "versions",
    "run",
}


def lora_grpo(*arguments: str) -> str:
    """What the command prints on stdout."""
    command = [sys.executable, "-m", "lora_grpo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(evaluation: Path) -> list[dict[str, Any]]:
    return json.loads(evaluation.read_text())["rows"]


def test_demo_learns_and_its_accuracies_can_be_recomputed(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    result = json.loads(lora_grpo("demo", "--output-dir", str(run), "--steps", "12").splitlines()[-1])
    assert result.keys() >= KEYS
    assert result["steps"] == 12
    assert result["versions"] == 13
    assert result["accuracy_before"] <= 0.55
    assert result["accuracy_after"] >= 0.85
    assert result["accuracy_easy_after"] >= 0.9
    assert result["logprob_gap_mean"] < 0.01
    answers = rows_of(run / "evaluations" / "000013.json")
    assert len({row["prompt"] for row in answers}) == len(answers) == 512
    assert {row["version"] for row in answers} == {13}
    trained_on = {json.loads(line)["prompt"] for line in (run / "data" / "train.jsonl").read_text().splitlines()}
    assert not trained_on & {row["prompt"] for row in answers}
    page = Path(lora_grpo("report", str(run)).strip()).read_text()
    for words in ("12 proven", "held-out prompts, ", "v13 HEAD", "tensors equal"):
        assert words in page
    again = json.loads(lora_grpo("eval", str(run), "--json"))
    assert [row["version"] for row in again] == [1, 13]
    assert again[0]["reward"] == pytest.approx(result["accuracy_before"], abs=0.005)
    assert again[1]["reward"] == pytest.approx(result["accuracy_after"], abs=0.005)
