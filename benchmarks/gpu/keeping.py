"""What came of the steps so far: a JSON file each, a summary, and one archive of everything."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steps import Step

ARCHIVE, SUMMARY = "results.tar.gz", "summary.json"
_LEFT_OUT = (ARCHIVE, ".safetensors", ".pt", ".new")
"""The archive itself, and what of a demo run are weights."""


class Record:
    """How each step stands: passed, failed, refused, cut off, interrupted, not started."""

    def __init__(self, out: Path, steps: Sequence[Step], notes: Sequence[str]) -> None:
        self.out, self.steps, self.notes = out, steps, list(notes)
        for folder in ("steps", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        self.done = {step.name: json.loads(path.read_text()) for step in steps if (path := self._path(step)).exists()}

    def state(self, step: Step) -> str:
        return str(self.done.get(step.name, {}).get("state", "not started"))

    def result(self, name: str) -> Any:
        return self.done.get(name, {}).get("result")

    def keep(self, step: Step, done: dict[str, Any]) -> None:
        """Write down what a step came to, with everything that there is of the others."""
        self.done[step.name] = {"step": step.name, "expected_s": step.expected_s, "limit_s": step.limit_s, **done}
        write(self._path(step), self.done[step.name])
        why = f": {done['why']}" if done.get("why") else ""
        print(f"{step.name}: {done['state']} after {done['seconds']} s{why}", flush=True)
        self.save()

    def save(self) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        rows = [self._row(step) for step in self.steps]
        command = shlex.join(["python", "benchmarks/gpu/run.py", *sys.argv[1:]])
        write(self.out / SUMMARY, {"command": command, "at": at, "notes": self.notes, "steps": rows})
        self._pack()

    def table(self) -> str:
        """The schedule, with what it took."""
        rows = [self._row(step) for step in self.steps]
        lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def _row(self, step: Step) -> dict[str, Any]:
        done = self.done.get(step.name, {})
        return {
            "step": step.name,
            "state": self.state(step),
            "seconds": done.get("seconds", "-"),
            "estimate for a GPU, s": step.expected_s,
            "limit, s": step.limit_s,
            "why": done.get("why") or "-",
        }

    def _path(self, step: Step) -> Path:
        return self.out / "steps" / f"{step.name}.json"

    def _pack(self) -> None:
        staged = self.out / f"{ARCHIVE}.new"
        with tarfile.open(staged, "w:gz", compresslevel=3) as archive:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and not path.name.endswith(_LEFT_OUT):
                    archive.add(path, path.relative_to(self.out))
        os.replace(staged, self.out / ARCHIVE)


def write(path: Path, content: dict[str, Any]) -> None:
    staged = path.with_name(f"{path.name}.new")
    staged.write_text(json.dumps(content, indent=1))
    os.replace(staged, path)
