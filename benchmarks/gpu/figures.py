"""One step's figures against merging, strategies in turn.

`figures.py {0.5b,7b,7b-compiled} --shape SHAPE --device DEVICE --out DIR --models DIR`. Ended or cut off, it leaves
DIR/results.json, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from lora_grpo.bench.scenario import plan_parts
from lora_grpo.bench.settings import Settings
from lora_grpo.bench.suite import Suite
from lora_grpo.errors import LoraGrpoError

ALL: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "prompt_tokens": 256,
    "rows": (1, 64),
    "lengths": (256,),
    "least_s": 0.5,
    "canary_rows": (),
    "sweep_ranks": (),
    "sweep_targets": (),
}
DRY: dict[str, Any] = {
    "in_turn": True,
    "graphs": "alone",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "prompt_tokens": 8,
    "rows": (1, 4),
    "lengths": (8,),
    "least_s": 0.0,
    "repeat": 2,
}
"""On the CPU, where nothing is measured but that all of it runs; nothing is captured or compiled there."""
MERGES = ("native", "merge-trl", "merge-fold")
SHARED = (*MERGES, "native-shared")
STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "0.5b": {
        "all": {"graphs": False},
        "sync": {"strategies": MERGES, "repeat": 30},
        "memory": {"strategies": MERGES},
        "rollback": {"strategies": MERGES, "repeat": 5},
    },
    "7b": {
        "all": {"graphs": "alone"},
        "sync": {"strategies": SHARED, "repeat": 10},
        "memory": {"strategies": SHARED},
        "rollback": {"strategies": ("native", "merge-fold"), "repeat": 4},
        "decode": {"strategies": ("native", "merge-trl", "base", "native-gemm"), "repeat": 2},
    },
    "7b-compiled": {
        "all": {"graphs": True, "truth": False},
        "decode": {"strategies": ("native", "merge-trl"), "repeat": 2},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=tuple(STEPS))
    for name in ("--shape", "--device"):
        parser.add_argument(name, required=True)
    for name in ("--out", "--models"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(measure(options))
    except LoraGrpoError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


def measure(options: argparse.Namespace) -> int:
    dry = " --device cpu" if options.device == "cpu" else ""
    command = f"python benchmarks/gpu/run.py{dry} --only {options.step}"
    parts = settings(options.step, options.shape, options.device)
    with Suite(parts, command=command, out=options.out, models=options.models) as suite:
        code = 0
        try:
            suite.run(lambda doing, done: print(doing, flush=True))
        except KeyboardInterrupt:
            code = 130
        document = suite.document()
        suite.finish(document)
    for failure in document.failures:
        print(f"error: {failure}", flush=True)
    return code or int(bool(document.failures))


def settings(step: str, shape: str, device: str) -> dict[str, Settings]:
    """Settings by part."""
    tables = STEPS[step]
    common = {**ALL, **tables["all"], "shape": shape, "device": device}
    dry = DRY if device == "cpu" else {}
    return {part: plan_parts(part, None, {**common, **tables[part], **dry})[part] for part in tables if part != "all"}


if __name__ == "__main__":
    main()
