"""Attack what a run leaves open, and count what does not hold: a table, and JSON with --out.

    python -m benchmarks.attack [--seed 0] [--only NAME ...] [--out FILE]

Each attack is seeded and returns an `Outcome`: how often it was tried, what failed, and what was measured meanwhile.
The store server's trainer runs in a process of its own, with the 1,024 open files that most systems allow. The engine
is a real vLLM on a tiny model, in this process.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.attack import Outcome
from benchmarks.attack.engine import interrupts, two_threads
from benchmarks.attack.server import endless_header, idle_connections
from benchmarks.attack.store import broken_adapters, spoiled_files, stopped_at_calls
from lora_grpo.bench.provenance import provenance, write_result

ON_THE_STORE = (stopped_at_calls, broken_adapters, spoiled_files)
ATTACKS = (idle_connections, endless_header, *ON_THE_STORE, two_threads, interrupts)


def main() -> int:
    names = [attack.__name__ for attack in ATTACKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="a file for the outcomes as JSON")
    arguments = parser.parse_args()
    outcomes = []
    for attack in ATTACKS:
        if attack.__name__ in arguments.only:
            started = time.monotonic()
            outcomes.append(attack(arguments.seed))
            outcomes[-1].figures["seconds"] = time.monotonic() - started
            print(_row(outcomes[-1]), flush=True)
            for fault in outcomes[-1].faults[:5]:
                print(f"    {fault[:200]}", flush=True)
    made = {"outcomes": [asdict(outcome) for outcome in outcomes]}
    write_result(arguments.out, {**provenance("-m", "benchmarks.attack"), **made})
    return int(any(outcome.faults for outcome in outcomes))


def _row(outcome: Outcome) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in outcome.figures.items())
    return f"| {outcome.attack} | {outcome.tries} tries | {len(outcome.faults)} failed | {figures} |"


if __name__ == "__main__":
    raise SystemExit(main())
