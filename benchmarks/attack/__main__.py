"""Attack what a run leaves open, and count what does not hold: a table, and JSON with --out.

    python -m benchmarks.attack [--seed 0] [--only NAME,NAME] [--out FILE]

Each attack is seeded and returns an `Outcome`: how often it was tried, what failed, and what was measured meanwhile.
The store server's trainer runs in a process of its own, with the 1,024 open files that most systems allow. The engine
is a real vLLM on a tiny model, in this process."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.attack import Outcome, endless_header, idle_connections, interrupts, scratch, two_threads
from lora_grpo.bench.host import asked, provenance, write_result

KILLS, ERRORS, ADAPTERS = 340, 180, 1835


def stopped_at_calls(seed: int) -> Outcome:
    """SIGKILL, or an error of the disk, at exact system calls; runs copied, moved and out of date among them."""
    from tests.crash.attack import attack

    with scratch() as folder:
        return _judged("kills and failing disks at exact calls", attack(folder, seed, KILLS, ERRORS), KILLS + ERRORS)


def broken_adapters(seed: int) -> Outcome:
    """Published and opened as an engine would: refused by name, and the promoted version stays."""
    from tests.crash.attack import fuzz

    with scratch() as folder:
        return _judged("broken adapters", fuzz(folder, seed, ADAPTERS), ADAPTERS)


def spoiled_files(seed: int) -> Outcome:
    """Every file of a trained run, spoiled in every way: what each command makes of it."""
    from tests.crash.damage import KINDS, attack, files, trained

    with scratch() as folder, trained(folder) as run:
        result = attack(run, seed, [(name, kind) for name in files(run) for kind in KINDS])
    return _judged("spoiled files of a run, six commands", result, sum(result["table"].values()))


def _judged(attack: str, result: Mapping[str, Any], tries: int) -> Outcome:
    return Outcome(attack, tries, [json.dumps(fault) for fault in result["wrong"]], result["table"])


STORE = (stopped_at_calls, broken_adapters, spoiled_files)
ATTACKS = {one.__name__: one for one in (idle_connections, endless_header, *STORE, two_threads, interrupts)}


def main() -> int:
    options, outcomes = asked(__doc__, seed=0, only=",".join(ATTACKS), out=None), []
    if unknown := set(options.only.split(",")) - set(ATTACKS):
        raise SystemExit(f"--only: no attack {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
    for name in options.only.split(","):
        started = time.monotonic()
        outcome = ATTACKS[name](options.seed)
        outcome.figures["seconds"] = time.monotonic() - started
        outcomes.append(outcome)
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in outcome.figures.items())
        print(f"| {outcome.attack} | {outcome.tries} tries | {len(outcome.faults)} failed | {figures} |", flush=True)
        for fault in outcome.faults[:5]:
            print(f"    {fault[:200]}", flush=True)
    write_result(options.out, {**provenance("-m", "benchmarks.attack"), "outcomes": list(map(asdict, outcomes))})
    return int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
