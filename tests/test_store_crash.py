"""SIGKILL at system calls and at random times: see tests/crash/driver.py for what is checked after each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_nothing_is_lost_or_half_written_by_a_kill(shm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After each kill: the store opens, every version verifies, HEAD is complete, numbers never come back."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.driver", str(shm_dir), "20", "200", "60"], capture_output=True, text=True
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
    assert summary["versions"] > 150
    assert min(summary["events"].values()) >= 5
