"""Everything that is to be seen on a GPU, most valuable first, in two calls of one command:

    python benchmarks/gpu/run.py --out DIR

Each step is a process with a limit of its own, a fork of one that has imported vLLM; one that fails or is cut off does
not stop the rest. Its JSON and log in DIR, and DIR/results.tar.gz with all that there is, are written the moment it
ends. Calling again goes on with what is missing: what passed is kept, what failed is tried again after all others, in a
fresh Python. The models stay until all steps have passed.
`lora-grpo bench report --out DIR` makes tables and plots of what came back, anywhere. `--device cpu` is the dry run,
with tiny models."""

import argparse
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

from steps import REPOSITORY, Record, Step, plan

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lora_grpo.bench.imported"])
Process: TypeAlias = BaseProcess | subprocess.Popen[bytes]

SHARED = Path("/dev/shm")
NAME = "lora-grpo-gpu"
LEAST_S = 15.0  # less than this is not worth starting a step for
GRACE_S = 25.0  # for a step that ran out of time to keep what it has
REPORT_S = 120.0
SLOWER = 5  # times its limit that a step of a dry run may take, on processors that others use too
TAIL, WIDTH = 40, 400  # lines and characters of a step's output that stand beside its result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    # A step that is ended from outside is written down like any other.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, place = options.out.resolve(), choose_place(options.models, options.device)
    record = Record(out, plan(out, options.device, place.models), place.notes)
    chosen = [step for step in record.steps if not options.only or step.name in options.only]
    os.environ.update(environment(place))
    sys.path.append(str(REPOSITORY))
    go_through(chosen, record, place, deadline, SLOWER if options.device == "cpu" else 1)
    return finish(record, place)


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


@dataclass(frozen=True)
class Place:
    """`refusal` says why no step with the large model can run; empty where they can."""

    models: Path
    notes: list[str] = field(default_factory=list)
    refusal: str = ""


def choose_place(asked: Path | None, device: str) -> Place:
    """The folder that was asked for, or the first of memory and the temporary folder that has room."""
    # What the large model's files take, the small one's and the caches with them.
    needed = 64 << 20 if device == "cpu" else 16 << 30
    folders = [asked] if asked else [SHARED / NAME, Path(tempfile.gettempdir()) / NAME]
    free = {folder: _free_bytes(folder) for folder in folders}
    # An earlier call may have made the large model there.
    made = "qwen2.5-7b-seed*/config.json"
    fitting = [folder for folder in folders if any(folder.glob(made)) or free[folder] >= needed]
    chosen = fitting[0] if fitting else max(folders, key=lambda folder: free[folder])
    told = ", ".join(f"{size / (1 << 30):.1f} GiB are free for {folder}" for folder, size in free.items())
    refusal = f"the 7B model needs {needed >> 30} GiB for its files: {told}; name a folder with --models DIR"
    notes = [] if fitting[:1] == folders[:1] else [f"Models and caches were in {chosen}: {told}."]
    return Place(chosen.resolve(), notes, "" if fitting else refusal)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(one for one in (folder, *folder.resolve().parents) if one.is_dir())).free


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
        **{name: str(place.models / "caches" / folder) for name, folder in caches.items()},
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "PYTHONUNBUFFERED"), "1"),
        **{"VLLM_USE_FLASHINFER_SAMPLER": "0", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "TERM": "dumb"},
        # Looking for a GPU must not start CUDA where steps are forked from; vLLM sets it, too.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def go_through(chosen: Sequence[Step], record: Record, place: Place, deadline: float, slower: int) -> None:
    """Every step that has not passed, until time is over or somebody interrupts; without a card, none."""
    forks = True
    for step in sorted(chosen, key=lambda step: is_repeated(step, record)):
        if record.state(step) == "passed":
            continue
        if step.name != "card" and not record.done.get("card", {}).get("result"):
            return
        limit_s = min(step.limit_s * slower, deadline - GRACE_S - time.monotonic())
        if step.is_large and place.refusal:
            record.keep(step, {"state": "refused", "seconds": 0.0, "why": place.refusal})
        elif limit_s > LEAST_S:
            log = record.out / "logs" / f"{step.name}.log"
            record.keep(step, run_step(step, log, limit_s, forks and step.warm and record.state(step) != "failed"))
            if step.name == "card" and record.state(step) == "failed":
                forks = False
                record.keep(step, run_step(step, log, limit_s, forks))
        if record.state(step) == "interrupted":
            return


def is_repeated(step: Step, record: Record) -> bool:
    """Whether a step would only do again what an earlier call saw of it; others come first. Figures that were cut off
    go on where they were."""
    seen = ("failed",) if step.shape else ("failed", "cut off")
    return step.name != "card" and record.state(step) in seen


def run_step(step: Step, log: Path, limit_s: float, warm: bool) -> dict[str, Any]:
    started = time.monotonic()
    process = start(step.command, log, warm=warm)
    try:
        code = wait(process, limit_s - (time.monotonic() - started))
        state = "cut off" if code is None else ""
    except KeyboardInterrupt:
        state = "interrupted"
    if state:
        # Asked to end, a benchmark keeps what it has measured; then the step ends, and all that it started.
        send(process, signal.SIGTERM)
        wait(process, GRACE_S)
        send(process, signal.SIGKILL)
        code = wait(process)
    tail = log.read_text(errors="replace").splitlines()[-TAIL:]
    why = next((line.removeprefix("error: ") for line in reversed(tail) if line.startswith("error: ")), "")
    # A program of ours that refuses says why.
    ended = "refused" if code == 2 and why else "failed" if code else "passed"
    return {
        "state": state or ended,
        "rc": code,
        "seconds": round(time.monotonic() - started, 1),
        "command": list(step.command),
        "result": last_json(tail),
        "why": why,
        "tail": [line[:WIDTH] for line in tail],
    }


def start(command: Sequence[str], log: Path, *, warm: bool) -> Process:
    """`warm` forks begin with all imports done; they are a script or a module (`-m`) of Python's."""
    with open(log, "w") as output:
        if warm:
            forked = FORKS.Process(target=become, args=(list(command), str(log)))
            # Imports may end the process that others are forked from; in a fresh one they will say why.
            with suppress(EOFError, OSError):
                forked.start()
                return forked
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, **streams)


def wait(process: Process, timeout_s: float | None = None) -> int | None:
    """Its exit code; None if it still runs by then."""
    if isinstance(process, BaseProcess):
        process.join(timeout_s)
        return process.exitcode
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    return process.returncode


def send(process: Process, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signum)


def become(command: Sequence[str], log: str) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    with open(log, "a") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    # CUDA cannot be started where the process that this one was forked from has.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(command[0], command)
    _, *words = command
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def last_json(lines: Sequence[str]) -> Any:
    """The last line that is a JSON object; what a step writes into files lies in the archive as it is."""
    for line in reversed(lines):
        if line.startswith("{"):
            with suppress(ValueError):
                return json.loads(line)
    return None


def finish(record: Record, place: Place) -> int:
    """Report, archive and schedule of all that there is; the models go when nothing is left to do."""
    if any(record.out.glob("bench/*/results.json")):
        command = [sys.executable, "-m", "lora_grpo", "bench", "report", "--out", str(record.out)]
        record.save()
        with open(record.out / "logs" / "report.log", "w") as log:
            try:
                subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=log, timeout=REPORT_S)
            except subprocess.TimeoutExpired:
                print(f"no report within {REPORT_S:.0f} s; later: lora-grpo bench report --out {record.out}")
    record.save()
    record.show()
    if any(record.state(step) != "passed" for step in record.steps):
        return 1
    shutil.rmtree(place.models, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
