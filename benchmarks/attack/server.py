"""Attacks on the store server, from connections that hold no token."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.attack import Outcome, scratch
from lora_grpo.bench.gauges import proc_bytes
from lora_grpo.errors import LoraGrpoError
from lora_grpo.remote.client import StoreClient

TOKEN = "a-token-of-the-attack"
MIB = 1 << 20

TRAINER = """
import resource, sys
from pathlib import Path
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.remote.server import StoreServer
root, token, files = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
with AdapterStore(Path(root, "store"), Path(root, "run")) as store, StoreServer(store, token) as server:
    print(server.url, server.run, flush=True)
    for line in sys.stdin:
        try:
            content = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [line.encode() * 1000]}
            store.promote(store.publish(content, step=0))
            store.flush()
            print("ok", store.head.number, flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
"""


@dataclass
class Trainer:
    """A process that publishes when it is told to, and serves its store."""

    process: subprocess.Popen[str]
    url: str
    run: str

    def publish(self, text: str) -> str:
        """Its answer: "ok NUMBER", or the error."""
        print(text, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def pull(self, number: int) -> float:
        """Seconds that a replica with the token takes for a version."""
        started = time.monotonic()
        client = StoreClient(self.url, TOKEN)
        with tempfile.TemporaryDirectory() as folder:
            client.pull(self.run, client.manifest(self.run, number), Path(folder))
        client.close()
        return time.monotonic() - started

    @property
    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def resident_mib(self) -> float:
        return proc_bytes(f"{self.process.pid}/status", "VmRSS")[0] / MIB

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=20)


@contextmanager
def trainer(open_files: int = 1024) -> Iterator[Trainer]:
    with scratch() as root:
        command = [sys.executable, "-c", TRAINER, str(root), TOKEN, str(open_files)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
        most_files, pull_s = attacked.open_files, [0.0]
        for index in range(connections):
            connection = held.enter_context(attacked.connect())
            with suppress(OSError):  # it may have been closed to make room
                connection.sendall(b"GET /versions/1 HTTP/1.1\r\nHost: here\r\n"[: draw.randrange(40)])
            if index % (connections // 20) == 0 or index == connections - 1:
                most_files = max(most_files, attacked.open_files)
                answer = attacked.publish(f"v{index}")
                outcome.expect(answer.startswith("ok"), f"publish with {index + 1} connections: {answer}")
                try:
                    pull_s.append(attacked.pull(1))
                    outcome.expect(True, "")
                except LoraGrpoError as error:
                    outcome.expect(False, f"pull with {index + 1} connections: {error}")
    outcome.figures = {"connections": connections, "most_open_files": most_files, "slowest_pull_s": max(pull_s)}
    return outcome


def endless_header(seed: int, mib: int = 350, patience_s: float = 30.0) -> Outcome:
    """One header that never ends, as fast as it is taken, and one that comes a byte at a time."""
    outcome, draw = Outcome("endless header"), random.Random(seed)
    with trainer() as attacked:
        attacked.publish("first")
        before_mib = attacked.resident_mib
        with attacked.connect() as fast:
            header = b"GET /versions/1 HTTP/1.1\r\nX-Endless: " + draw.randbytes(MIB).hex().encode()
            taken_mib = _pour(fast, header, mib)
            grown_mib = attacked.resident_mib - before_mib
        outcome.expect(taken_mib < mib, f"all {mib} MiB were taken")
        outcome.expect(grown_mib < 32, f"the server grew by {grown_mib:.0f} MiB")
        started = time.monotonic()
        with attacked.connect() as slow:
            slow.settimeout(0.2)
            while time.monotonic() - started < patience_s and _drips(slow):
                pass
        held_s = time.monotonic() - started
        outcome.expect(held_s < patience_s, f"a slow header was waited for for {held_s:.0f} s")
        answer = attacked.publish("last")
        outcome.expect(answer.startswith("ok"), f"publish afterwards: {answer}")
    outcome.figures = {"taken_mib": taken_mib, "grown_mib": max(0.0, grown_mib), "slow_one_held_s": held_s}
    return outcome


def _pour(connection: socket.socket, text: bytes, mib: int) -> float:
    """MiB that were taken before the other side closed."""
    sent = 0
    with suppress(OSError):
        while sent < mib * MIB:
            sent += connection.send(text)
            text = b"a" * MIB
    return sent / MIB


def _drips(connection: socket.socket) -> bool:
    """Whether the connection takes another byte of a header, and has not been closed."""
    try:
        connection.sendall(b"G")
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False
