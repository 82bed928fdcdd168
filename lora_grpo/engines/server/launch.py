"""Starts `vllm serve` replicas on this host with the flags that `VLLMServerEngine` needs, and ends them together."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import NoReturn, Self

import httpx

from lora_grpo.engines import compat
from lora_grpo.engines.resolver import PLUGIN, URL_VARIABLE
from lora_grpo.errors import ConfigError, EngineError
from lora_grpo.remote.client import TOKEN_FILE_VARIABLE, read_token

OWN_OPTIONS = ("--host", "--port", "--uds", "--api-key")
"""vLLM's options that decide who gets in; they are set here, where an open address is refused without a key."""

_WORKER_DIED = re.compile(r"Worker proc (\S+) died unexpectedly \(exit code: (-?\d+)\)")
_NO_TILES = " (a forbidden instruction; if that is AMX, `lora-grpo serve MODEL -- --dtype float32` keeps vLLM off it)"

_STOP_PATIENCE_S = 20.0
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve, and how. Ports count on from `port`, one a replica; `arguments` go to vLLM as they are. A server
    may take `start_timeout_s` until it answers, its download and compilation included."""

    model: str
    replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    max_lora_rank: int = 16
    max_loras: int = 2
    max_cpu_loras: int | None = None
    target_modules: tuple[str, ...] = ()
    api_key: str | None = None
    store_url: str | None = None
    store_token_file: str | None = None
    arguments: tuple[str, ...] = ()
    start_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.host not in ("127.0.0.1", "::1", "localhost") and not self.api_key:
            why = "whoever may load adapters may read files: set an API key in VLLM_API_KEY, or serve on 127.0.0.1"
            raise ConfigError(f"host={self.host} lets other machines in, and {why}")
        if self.store_token_file:
            if not self.store_url:
                raise ConfigError("a store token file is of no use without the store's address (store_url)")
            read_token(self.store_token_file)
        if taken := [argument for argument in self.arguments if _is_own(argument)]:
            said = f"{', '.join(taken)} cannot be handed on to vLLM, which would open an address unseen"
            raise ConfigError(f"{said}: use lora-grpo's own --host and --port, and VLLM_API_KEY")

    def command(self, port: int) -> list[str]:
        # The `vllm` command asks for a distribution of that name, which the CPU builds do not have.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--host", self.host, "--port", str(port), "--enable-lora", "--logprobs-mode", "processed_logprobs"]
        # A server never lets go of an adapter in memory, so there is room for two more than slots.
        in_memory, rank = self.max_cpu_loras or self.max_loras + 2, compat.allowed_rank(self.max_lora_rank)
        command += ["--max-lora-rank", f"{rank}", "--max-loras", f"{self.max_loras}", "--max-cpu-loras", f"{in_memory}"]
        layers = ["--lora-target-modules", *self.target_modules] if self.target_modules else []
        return [*command, *layers, *self.arguments]

    def environment(self, replica: int, devices: int) -> dict[str, str]:
        """Of one replica's process, on a host with that many GPUs; what the user has set wins but for the devices."""
        chosen = {"VLLM_LOGGING_LEVEL": "WARNING"}
        token_file = self.store_token_file and str(Path(self.store_token_file).absolute())
        needed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": self.api_key}
        needed |= {URL_VARIABLE: self.store_url, TOKEN_FILE_VARIABLE: token_file}
        plugins = os.environ.get("VLLM_PLUGINS")
        if plugins is not None and PLUGIN not in plugins.split(","):
            needed["VLLM_PLUGINS"] = f"{plugins},{PLUGIN}".strip(",")
        if devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
            share = devices // self.replicas
            needed["CUDA_VISIBLE_DEVICES"] = ",".join(visible[replica * share : (replica + 1) * share])
        else:
            # vLLM would pin every replica's threads to the same cores.
            cores = sorted(os.sched_getaffinity(0))
            own = cores[replica * len(cores) // self.replicas : (replica + 1) * len(cores) // self.replicas]
            chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own or [cores[replica % len(cores)]]))
            chosen["VLLM_CPU_KVCACHE_SPACE"] = "1"
        return {**chosen, **os.environ, **{name: value for name, value in needed.items() if value}}

    def url(self, port: int) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_own(argument: str) -> bool:
    """Whether vLLM would read `argument` as one of `OWN_OPTIONS`: it takes `_` for `-`, and the start of a name."""
    name = argument.partition("=")[0].replace("_", "-")
    return len(name) > 2 and any(option.startswith(name) for option in OWN_OPTIONS)


def _end_of(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"died of {known.get(-exit_code, f'signal {-exit_code}')}"


class Server:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> None:
        self.command, self.environment, self.url, self.log = list(command), dict(environment), url, log
        self._process: Popen[bytes] | None = None
        self._log_from = 0

    def start(self) -> None:
        """Start the process; its log goes on where it was. It gets no Ctrl-C of a terminal: `stop` is its end."""
        with open(self.log, "ab") as log:
            self._log_from = log.tell()
            self._process = Popen(
                self.command, env=self.environment, stdout=log, stderr=log, stdin=DEVNULL, start_new_session=True
            )

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def require_alive(self) -> None:
        """Raises `EngineError` with what ended it, or its worker, and the end of the log when the process ended."""
        if self.exit_code is None:
            return
        said = f"the server at {self.url} {_end_of(self.exit_code)}"
        # vLLM says the number of the signal that ended a worker, and no more.
        if died := _WORKER_DIED.search(self.log.read_bytes()[self._log_from :].decode(errors="replace")):
            said += f" after its worker {died[1]} {_end_of(int(died[2]))}"
            said += _NO_TILES if int(died[2]) == -signal.SIGILL else ""
        raise EngineError(f"{said}; {self.tail()}")

    def tail(self) -> str:
        return "\n".join([f"the end of {self.log}:", *self.log.read_text(errors="replace").splitlines()[-20:]])

    def signal(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def wait(self, timeout_s: float) -> bool:
        if self._process is not None:
            with suppress(TimeoutExpired):
                self._process.wait(timeout_s)
        return self.exit_code is not None


class Servers:
    def __init__(self, serving: Serving, log_dir: Path) -> None:
        import torch

        devices = torch.cuda.device_count()
        if 0 < devices < serving.replicas:
            raise ConfigError(f"replicas={serving.replicas} need a GPU each, and there are {devices}")
        self._start_timeout_s = serving.start_timeout_s
        self.all: list[Server] = []
        for index in range(serving.replicas):
            port, log = serving.port + index, log_dir / f"replica-{index}.log"
            self.all.append(Server(serving.command(port), serving.environment(index, devices), serving.url(port), log))
        self.urls = [server.url for server in self.all]

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Start all, wait until each is healthy, and end all after the block. Raises `EngineError` for the first that
        ends, or takes too long, and `ConfigError` where something else serves already."""
        try:
            for server in self.all:
                if server.healthy:
                    raise ConfigError(f"something serves at {server.url} already; choose another port")
                server.start()
            deadline = time.monotonic() + self._start_timeout_s
            while waiting := [server for server in self.all if not server.healthy]:
                self.require_alive()
                if time.monotonic() > deadline:
                    late, limit = waiting[0], f"start_timeout_s={self._start_timeout_s:g} s (--start-timeout)"
                    raise EngineError(f"the server at {late.url} does not answer after {limit}; {late.tail()}")
                time.sleep(_POLL_S)
            yield self
        finally:
            self._stop()

    def require_alive(self) -> None:
        for server in self.all:
            server.require_alive()

    def watch(self) -> NoReturn:
        while True:
            self.require_alive()
            time.sleep(_POLL_S)

    def _stop(self) -> None:
        """Asked first, killed after a while, with everything that they started."""
        for server in self.all:
            server.signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_PATIENCE_S
        for server in self.all:
            server.wait(max(0.0, deadline - time.monotonic()))
        for server in self.all:
            server.signal(signal.SIGKILL)
            server.wait(_STOP_PATIENCE_S)
