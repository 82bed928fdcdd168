"""Which commit's code is measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VARIABLE = "LORA_GRPO_COMMIT"
"""Says it where the code came without its repository, or beside an older one."""


def commit() -> str | None:
    """What the environment says; else the commit that this code was checked out at, a plus sign where files other than
    results differ; None for an installed copy."""
    if said := os.environ.get(VARIABLE):
        return said
    here = Path(__file__).parent.with_name("__init__.py")
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=10, check=True)
        described = [*git, "describe", "--always", "--abbrev=7", "--exclude=*"]
        name = subprocess.run(described, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        # A run that is cut off writes its results, and has to be the same code's when it goes on.
        changes = [*git, "diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results"]
        return name + ("+" if subprocess.run(changes, capture_output=True, timeout=30).returncode else "")
    except (OSError, subprocess.SubprocessError):
        return None
