"""`lora-grpo` in this process, for tests of what a command says and does; a process of its own costs an interpreter's
start, and torch's where tensors are read."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from lora_grpo import cli

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


def lora_grpo(*arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """What the command would have printed and ended with; what no command expects is raised."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(cli.app, list(map(str, arguments)), env=ENVIRONMENT, prog_name="lora-grpo")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(list(arguments), done.exit_code, done.stdout, done.stderr)
