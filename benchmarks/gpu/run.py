"""Everything that is to be seen on a GPU, in one command: what exists is run in order, and measured nowhere else.

    python benchmarks/gpu/run.py --out results --site /tmp/site --minutes 8

Goes on past a part that fails. Each leaves OUT/parts/NAME.json right after it, and OUT/summary.json says how all stand.
The same command again goes on: what passed is kept, what was cut off or failed is run again. `lora-grpo bench report
--out OUT/bench/NAME` draws plots later, anywhere. `--device cpu --shape tiny` is the dry run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import KERNELS, KINDS, MEASURED, PARITY, REPOSITORY, Part, plan, tuned_folder

LEAST_S = 20.0
"""Less than this is not worth starting a part for."""
GRACE_S = 25.0
"""For a part that ran out of time to keep what it has."""
TAIL = 40


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    time_s = 60 * options.minutes if options.minutes else float("inf")
    out = options.out.resolve()
    for folder in ("parts", "logs", "suites"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    # A part that is ended from outside is written down like any other.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    models = Path(f"/dev/shm/lora-grpo-gpu-{os.getpid()}")
    try:
        planned = plan(out, options.device, options.shape, options.select, models)
        chosen = [part for part in planned if not options.only or {part.name, part.kind} & set(options.only)]
        if not chosen:
            raise LookupError(f"--only {','.join(options.only)} names no part of this plan on {options.device}")
        environ = environment(options.site, options.commit, tuned_folder(out))
        states = run_all(chosen, out, time_s, environ, again=options.again)
    except LookupError as error:
        sys.exit(str(error))
    finally:
        shutil.rmtree(models, ignore_errors=True)
    return 0 if states and set(states.values()) <= {"passed", "kept"} else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where JSON and logs go")
    parser.add_argument("--site", type=Path, help="a folder with vLLM and what it needs (default: this environment)")
    parser.add_argument("--device", default="cuda:0", choices=("cuda:0", "cpu"), help="where trainer and engine are")
    parser.add_argument("--shape", type=words, default=["qwen2.5-0.5b"], help="model shapes, such as tiny or a,b,c")
    parser.add_argument("--only", type=words, default=[], help=f"parts or kinds: {', '.join(KINDS)}")
    parser.add_argument("--minutes", type=float, help="stop then; no part may take more than half of them")
    parser.add_argument("--commit", help="what to name the code by where it came without its repository")
    parser.add_argument("--select", help="of parity and nan, the tests that match (as pytest -k)")
    parser.add_argument("--again", action="store_true", help="run what has passed before, too")
    options = parser.parse_args(arguments)
    known = {*KINDS, *PARITY, *(f"{kind}-{shape}" for kind in (*MEASURED, *KERNELS) for shape in options.shape)}
    if unknown := set(options.only) - known:
        parser.error(f"--only {','.join(sorted(unknown))}: there is no such part; use {', '.join(KINDS)}")
    return options


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def environment(site: Path | None, commit: str | None, tuned: Path) -> dict[str, str]:
    """For the parts: this repository and the site folder to import from, its commit, what was tuned, no network."""
    paths = [str(REPOSITORY), *([] if site is None else [str(site.resolve())]), os.environ.get("PYTHONPATH", "")]
    fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_COLOR": "1", "TERM": "dumb"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    named = {} if commit is None else {"LORA_GRPO_COMMIT": commit}
    return {**os.environ, **fixed, **offline, **named, "LORA_GRPO_TUNED_KERNELS": str(tuned)}


def run_all(
    chosen: Sequence[Part], out: Path, time_s: float, environment: dict[str, str], *, again: bool
) -> dict[str, str]:
    """How each part stands, in the end and after each: passed, kept (from before), failed, cut off, or not started."""
    deadline = time.monotonic() + time_s
    states = dict.fromkeys((part.name for part in chosen), "not started")
    for part in chosen:
        record = out / "parts" / f"{part.name}.json"
        if not again and record.exists() and json.loads(record.read_text())["state"] == "passed":
            states[part.name] = "kept"
        elif (left_s := deadline - time.monotonic()) > LEAST_S:
            done = run_part(part, out / "logs" / f"{part.name}.log", min(left_s, time_s / 2), environment)
            write(record, done)
            states[part.name] = done["state"]
        print(f"{part.name}: {states[part.name]}", flush=True)
        write(out / "summary.json", {"command": sys.argv, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "parts": states})
        if states[part.name] == "interrupted":
            break
    return states


def run_part(part: Part, log: Path, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part until it ends or has used up its time; what is to be known about it."""
    started, state = time.monotonic(), ""
    with open(log, "w") as output:
        process = subprocess.Popen(
            part.command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(None if limit_s == float("inf") else limit_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            state = "interrupted" if isinstance(reason, KeyboardInterrupt) else "cut off"
            stop(process)
    printed = log.read_text(errors="replace")
    return {
        "part": part.name,
        "state": state or ("failed" if process.returncode else "passed"),
        "rc": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "command": part.command,
        "result": part.read(printed),
        "tail": printed.splitlines()[-TAIL:],
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the part to end, which keeps what a benchmark has measured; then end it, and all that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write(path: Path, content: dict[str, Any]) -> None:
    staged = path.with_suffix(".new")
    staged.write_text(json.dumps(content, indent=1))
    os.replace(staged, path)


if __name__ == "__main__":
    sys.exit(main())
