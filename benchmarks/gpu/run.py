"""Everything that is to be seen on a GPU, most valuable first, in two calls of one command:

    python benchmarks/gpu/run.py --out DIR

Each step is a process with a limit of its own, a fork of one that has imported vLLM; one that fails or is cut off does
not stop the rest. Its JSON and log in DIR, and DIR/results.tar.gz with all that there is, are written the moment it
ends. Calling again goes on with what is missing: what passed is kept, what failed is tried again after all others, in a
fresh Python. The models stay until all steps have passed.
`lora-grpo bench report --out DIR` makes tables and plots of what came back, anywhere. `--device cpu` is the dry run,
with tiny models.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import Drawing
from keeping import Record
from launching import Launcher, Started
from places import Place, choose_place
from steps import REPOSITORY, SHAPES, Step, plan

LEAST_S = 15.0
"""Less than this is not worth starting a step for."""
GRACE_S = 25.0
"""For a step that ran out of time to keep what it has."""
REPORT_S = 120.0
SLOWER = 5
"""Times its limit that a step of a dry run may take, on processors that others use too."""
TAIL = 40


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    # A step that is ended from outside is written down like any other.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, place = options.out.resolve(), choose_place(options.models, options.device)
    record = Record(out, plan(out, options.device, place.models), place.notes)
    chosen = [step for step in record.steps if not options.only or step.name in options.only]
    environ = environment(place)
    launcher = Launcher(environ, record.out / "logs" / "launch.log")
    drawing = Drawing(launcher)
    try:
        go_through(chosen, record, place, drawing, launcher, deadline, options.device)
    finally:
        drawing.end()
        launcher.close()
    return finish(record, place, environ)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where JSON, logs and the archive go")
    parser.add_argument("--minutes", type=float, default=8.5, help="for this call (default: 8.5)")
    parser.add_argument("--models", type=Path, help="where models and caches go (default: /dev/shm)")
    parser.add_argument("--device", default="cuda:0", choices=("cuda:0", "cpu"), help="where trainer and engine are")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these steps alone, such as 7b,demo")
    options = parser.parse_args(arguments)
    known = [step.name for step in plan(options.out, options.device, Path())]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only {','.join(sorted(unknown))}: there is no such step; use {', '.join(known)}")
    return options


def environment(place: Place) -> dict[str, str]:
    """For all steps: this repository first, no network, caches that they share unless others are set, and the base of
    the demo where it was carried along. Without FlashInfer's package, vLLM's sampler must not look for it."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    caches = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    carried = REPOSITORY / ".gpu"
    commit = carried / "commit"
    return {
        **({"XDG_CACHE_HOME": str(carried)} if (carried / "lora-grpo").is_dir() else {}),
        **({"LORA_GRPO_COMMIT": commit.read_text().strip()} if commit.exists() else {}),
        **{name: str(place.caches / folder) for name, folder in caches.items()},
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Looking for a GPU must not start CUDA where steps are forked from; vLLM sets it, too.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }


def go_through(
    chosen: Sequence[Step],
    record: Record,
    place: Place,
    drawing: Drawing,
    launcher: Launcher,
    deadline: float,
    device: str,
) -> None:
    """Every step that has not passed, until time is over or somebody interrupts; without a card, none."""
    for step in sorted(chosen, key=lambda step: is_repeated(step, record)):
        if record.passed(step):
            continue
        if step.name != "card" and not record.result("card"):
            return
        if step.name != "card" and not drawing.started and wants_large(chosen, record, place):
            shape = SHAPES[device.partition(":")[0]]["7b"]
            drawing.start(shape, place.models / f"{shape}-seed0", device, record.out / "logs" / "draw.log")
        drawing.between_steps(step.limit_s if step.is_large else 0.0)
        left_s = deadline - GRACE_S - time.monotonic()
        limit_s = min(step.limit_s * (SLOWER if device == "cpu" else 1), left_s)
        if why := refusal(step, record, place):
            record.keep(step, {"state": "refused", "seconds": 0.0, "why": why})
        elif limit_s > LEAST_S:
            warm, log = record.state(step) != "failed", record.out / "logs" / f"{step.name}.log"
            record.keep(step, run_step(step, log, limit_s, launcher, warm))
            if step.name == "card" and record.state(step) == "failed":
                launcher.forks = False
                record.keep(step, run_step(step, log, limit_s, launcher, False))
        if record.state(step) == "interrupted":
            return


def is_repeated(step: Step, record: Record) -> bool:
    """Whether a step would only do again what an earlier call saw of it; others come first. Figures that were cut off
    go on where they were."""
    seen = ("failed",) if step.shape else ("failed", "cut off")
    return step.name != "card" and record.state(step) in seen


def refusal(step: Step, record: Record, place: Place) -> str:
    """Why a step cannot run here, in one sentence; empty where it can."""
    too_large = (record.result("card") or {}).get("refused", {})
    return too_large.get(step.name, "") or (place.refusal if step.is_large else "")


def wants_large(chosen: Sequence[Step], record: Record, place: Place) -> bool:
    return any(step.is_large and not record.passed(step) and not refusal(step, record, place) for step in chosen)


def run_step(step: Step, log: Path, limit_s: float, launcher: Launcher, warm: bool) -> dict[str, Any]:
    """Run a step until it ends or has used up its time; what is to be known about it."""
    started, state = time.monotonic(), ""
    with open(log, "w") as output:
        process = launcher.start(step.command, warm=warm and step.warm, stdout=output.fileno())
    try:
        process.wait(limit_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        state = "interrupted" if isinstance(reason, KeyboardInterrupt) else "cut off"
        stop(process)
    tail = log.read_text(errors="replace").splitlines()[-TAIL:]
    why = next((line.removeprefix("error: ") for line in reversed(tail) if line.startswith("error: ")), "")
    if not state:
        # A program of ours that refuses says why.
        state = "refused" if process.returncode == 2 and why else "failed" if process.returncode else "passed"
    return {
        "state": state,
        "rc": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_s": round(process.cpu_s, 1),
        "command": list(step.command),
        "result": step.read("\n".join(tail)),
        "why": why,
        "tail": tail,
    }


def stop(process: Started) -> None:
    """Ask the step to end, which keeps what a benchmark has measured; then end it, and all that it started."""
    process.send(signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.send(signal.SIGKILL)
        process.wait()


def finish(record: Record, place: Place, environ: Mapping[str, str]) -> int:
    """Report, archive and schedule of all that there is; the models go when nothing is left to do."""
    if any(record.out.glob("bench/*/results.json")):
        command = [sys.executable, "-m", "lora_grpo", "bench", "report", "--out", str(record.out)]
        record.save()
        with open(record.out / "logs" / "report.log", "w") as log:
            try:
                subprocess.run(command, cwd=REPOSITORY, env=dict(environ), stdout=log, stderr=log, timeout=REPORT_S)
            except subprocess.TimeoutExpired:
                print(f"no report within {REPORT_S:.0f} s; later: lora-grpo bench report --out {record.out}")
    record.save()
    print(record.table())
    all_passed = all(record.passed(step) for step in record.steps)
    if all_passed:
        shutil.rmtree(place.models, ignore_errors=True)
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
