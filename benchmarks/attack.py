"""Attack what a run leaves open, and count what does not hold: a table, and JSON with --out.

    python -m benchmarks.attack [--seed 0] [--only NAME,NAME] [--out FILE]

Each attack is seeded and returns an `Outcome`: how often it was tried, what failed, and what was measured meanwhile.
The store server's trainer runs in a process of its own, with the 1,024 open files that most systems allow. The engine
is a real vLLM on a tiny model, in this process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import torch

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.bench.host import asked, provenance, write_result
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import EngineError, LoraGrpoError
from lora_grpo.remote.client import StoreClient
from lora_grpo.types import Sampling
from tests.crash import attack, damage
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

scratch = partial(tempfile.TemporaryDirectory, dir="/dev/shm", prefix="lora-grpo-attack-")
PROMPT = list(range(100, 112))
TOKEN = "a-token-of-the-attack"
MIB = 1 << 20
KILLS, ERRORS, ADAPTERS = 340, 180, 1835
TRAINER = Path(__file__).with_name("attacked.py")


@dataclass
class Outcome:
    """`faults` has a sentence for each try that did not hold; `figures` have their units in their names."""

    attack: str
    tries: int = 0
    faults: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        self.tries += 1
        if not holds:
            self.faults.append(otherwise)


@dataclass
class Trainer:
    """A process that publishes when it is told to, and serves its store."""

    process: psutil.Popen
    url: str
    run: str

    def publish(self, text: str) -> str:
        """Its answer: "ok NUMBER", or the error."""
        print(text, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def pull(self) -> None:
        """What a replica with the token does for a version."""
        with tempfile.TemporaryDirectory() as folder, closing(StoreClient(self.url, TOKEN)) as client:
            client.pull(self.run, client.manifest(self.run, 1), Path(folder))

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=20)


@contextmanager
def trainer(open_files: int = 1024) -> Iterator[Trainer]:
    with scratch() as root:
        command = [sys.executable, str(TRAINER), root, TOKEN, str(open_files)]
        process = psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            url, run = process.stdout.readline().split()
            yield Trainer(process, url, run)
        finally:
            process.stdin.close()
            process.wait(60)


def idle_connections(seed: int, connections: int = 1100, open_files: int = 1024) -> Outcome:
    """Nobody with a token: connections that say nothing or little. The trainer publishes, and replicas pull."""
    outcome, draw = Outcome("idle connections"), random.Random(seed)
    with trainer(open_files) as attacked, ExitStack() as held:
        most_files, pull_s = attacked.process.num_fds(), [0.0]
        for index in range(connections):
            connection = held.enter_context(attacked.connect())
            with suppress(OSError):  # it may have been closed to make room
                connection.sendall(b"GET /versions/1 HTTP/1.1\r\nHost: here\r\n"[: draw.randrange(40)])
            if index % (connections // 20) == 0 or index == connections - 1:
                most_files = max(most_files, attacked.process.num_fds())
                answer = attacked.publish(f"v{index}")
                outcome.expect(answer.startswith("ok"), f"publish with {index + 1} connections: {answer}")
                try:
                    pull_s.append(timeit(attacked.pull, number=1))
                    outcome.expect(True, "")
                except LoraGrpoError as error:
                    outcome.expect(False, f"pull with {index + 1} connections: {error}")
    outcome.figures = {"connections": connections, "most_open_files": most_files, "slowest_pull_s": max(pull_s)}
    return outcome


def endless_header(seed: int, mib: int = 350, patience_s: float = 30.0) -> Outcome:
    """One header that never ends, as fast as it is taken, and one that comes a byte at a time."""
    outcome, draw, sent = Outcome("endless header"), random.Random(seed), 0
    with trainer() as attacked:
        attacked.publish("first")
        before_bytes = attacked.process.memory_info().rss
        text = b"GET /versions/1 HTTP/1.1\r\nX-Endless: " + draw.randbytes(MIB).hex().encode()
        with attacked.connect() as fast:
            with suppress(OSError):  # the other side closes
                while sent < mib * MIB:
                    sent += fast.send(text)
                    text = b"a" * MIB
            grown_mib = (attacked.process.memory_info().rss - before_bytes) / MIB
        outcome.expect(sent < mib * MIB, f"all {mib} MiB were taken")
        outcome.expect(grown_mib < 32, f"the server grew by {grown_mib:.0f} MiB")
        started = time.monotonic()
        with attacked.connect() as slow, suppress(OSError):
            slow.settimeout(0.2)
            while time.monotonic() - started < patience_s:
                with suppress(TimeoutError):  # it waits for more
                    slow.sendall(b"G")
                    if not slow.recv(1):
                        break
        held_s = time.monotonic() - started
        outcome.expect(held_s < patience_s, f"a slow header was waited for for {held_s:.0f} s")
        answer = attacked.publish("last")
        outcome.expect(answer.startswith("ok"), f"publish afterwards: {answer}")
    outcome.figures = {"taken_mib": sent / MIB, "grown_mib": max(0.0, grown_mib), "slow_one_held_s": held_s}
    return outcome


@contextmanager
def tiny_engine() -> Iterator[tuple[Any, list[Any], Callable[[int], Any], list[Any]]]:
    """The engine, its versions, what asks it one of four questions for token ids (of which versions, the base among
    them, and how many tokens), and the right answers."""
    with ExitStack() as held:
        base = tiny_model("llama", Path(held.enter_context(tempfile.TemporaryDirectory())))
        store = held.enter_context(AdapterStore(Path(held.enter_context(scratch())) / "store"))
        model = cast(Any, tiny_lora(load_model(base)))
        form, versions = ServingForm(model, "default", torch.bfloat16), []
        for seed in range(3):
            refill_lora(model, scale=0.3, seed=seed)
            versions.append(store.publish(form.files(), step=seed))
        engine = VLLMEngine(base, max_model_len=128, enforce_eager=True, gpu_memory_utilization=0.1)
        held.callback(engine.close)
        for version in versions:
            engine.load(version)

        def ask(question: int) -> Any:
            adapters = [None, versions[question % 3], versions[(question + 1) % 3]]
            sampling = Sampling(n=2, max_tokens=4 + 4 * (question % 2), temperature=0.0, ignore_eos=True)
            groups = engine.generate([PROMPT] * 3, sampling, adapter=adapters)
            return [completion.token_ids for group in groups for completion in group.completions]

        yield engine, versions, ask, [ask(question) for question in range(4)]


def two_threads(seed: int, calls: int = 200) -> Outcome:
    """Both ask as fast as they can: each answer is the right one, or a sentence."""
    outcome, met = Outcome("two threads on one engine"), Counter[str]()
    with tiny_engine() as (_, _, ask, right):

        def asking(draw: random.Random) -> None:
            for _ in range(calls // 2):
                question = draw.randrange(4)
                try:
                    same = ask(question) == right[question]
                    met["answered"] += 1
                    outcome.expect(same, f"question {question} was answered with other tokens")
                except EngineError as error:
                    met["refused"] += 1
                    outcome.expect("one thread at a time" in str(error), str(error))
                    time.sleep(draw.random() * 0.2)  # so long that the two take turns
                except Exception as error:  # noqa: BLE001 - whatever it raises is a fault to be counted
                    outcome.expect(False, f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=asking, args=(random.Random(seed + i),), daemon=True) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
        outcome.expect(not any(thread.is_alive() for thread in threads), "a thread hangs")
        outcome.expect(ask(0) == right[0], "afterwards, question 0 was answered with other tokens")
    outcome.figures = dict(met)
    return outcome


def interrupts(seed: int, times: int = 200) -> Outcome:
    """Ctrl-C at a random time of a call; the next one is answered rightly, and every version can be swapped."""
    outcome, draw = Outcome("Ctrl-C in a running engine"), random.Random(seed)
    # A shell has what it starts in the background ignore Ctrl-C, and then nothing would be attacked.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raised = 0
    with tiny_engine() as (engine, versions, ask, right):
        usual_s = timeit(lambda: [ask(question) for question in range(4)], number=1) / 4
        for index in range(times):
            raised += _interrupted(lambda: ask(draw.randrange(4)), draw.random() * usual_s)
            question = draw.randrange(4)
            try:
                engine.unload(versions[index % 3])
                engine.load(versions[index % 3])
                outcome.expect(ask(question) == right[question], f"after interrupt {index}: other tokens")
            except Exception as error:  # noqa: BLE001 - whatever it raises is a fault to be counted
                outcome.expect(False, f"after interrupt {index}: {type(error).__name__}: {error}")
    outcome.expect(raised >= times // 2, f"Ctrl-C ended {raised} of {times} calls only")
    outcome.figures = {"raised_in_the_call": raised}
    return outcome


def _interrupted(call: Callable[[], Any], after_s: float) -> bool:
    """Whether Ctrl-C, that long after the call's start, ended it; it is over when this returns."""
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
    ended = False
    # What comes a moment late belongs to the call too.
    with suppress(KeyboardInterrupt):
        timer.start()
        call()
        ended = True
        timer.join()
        time.sleep(0.05)
    return not ended


def stopped_at_calls(seed: int) -> Outcome:
    """SIGKILL, or an error of the disk, at exact system calls; runs copied, moved and out of date among them."""
    with scratch() as folder:
        result = attack.attack(Path(folder), seed, KILLS, ERRORS)
    return _judged("kills and failing disks at exact calls", result, KILLS + ERRORS)


def broken_adapters(seed: int) -> Outcome:
    """Published and opened as an engine would: refused by name, and the promoted version stays."""
    with scratch() as folder:
        return _judged("broken adapters", attack.fuzz(Path(folder), seed, ADAPTERS), ADAPTERS)


def spoiled_files(seed: int) -> Outcome:
    """Every file of a trained run, spoiled in every way: what each command makes of it."""
    with scratch() as folder, damage.trained(Path(folder)) as run:
        result = damage.attack(run, seed, [(name, kind) for name in damage.files(run) for kind in damage.KINDS])
    return _judged("spoiled files of a run, six commands", result, sum(result["table"].values()))


def _judged(name: str, result: Mapping[str, Any], tries: int) -> Outcome:
    return Outcome(name, tries, [json.dumps(fault) for fault in result["wrong"]], result["table"])


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
