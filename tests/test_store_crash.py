"""SIGKILL at every named point and at random times: see tests/crash/driver.py for what is checked after each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_grpo.adapters
from tests.crash.driver import POINTS

ROOM = Path(lora_grpo.adapters.__path__[0])


def test_no_named_point_is_left_out() -> None:
    named = {point for file in ROOM.rglob("*.py") for point in re.findall(r'disk\.at\("(.+?)"\)', file.read_text())}
    named |= set(re.findall(r'^ +at\("(.+?)"\)', (ROOM / "files" / "disk.py").read_text(), re.MULTILINE))
    assert named == set(POINTS)


def test_nothing_is_lost_or_half_written_by_a_kill(shm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After each kill: the store opens, every version verifies, HEAD is complete, numbers never come back."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.driver", str(shm_dir), "20", "10", "60"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        share = summary["inside"] / summary["kills"]
        print(
            f"\n{summary['kills']} kills, {share:.0%} inside an operation ({summary['random']} at random times), "
            f"between them {summary['events']}, {summary['versions']} versions seen"
        )
    assert summary["kills"] >= 200
    assert share >= 0.8
    assert min(summary["points"].values()) >= 10
    assert summary["versions"] > 200
    assert min(summary["events"].values()) >= 5
