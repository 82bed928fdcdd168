"""`lora-grpo serve`: the flags that servers need, secrets kept off command lines, and ends that name the culprit."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora_grpo.cli import app
from lora_grpo.engines.local import targets
from lora_grpo.engines.resolver import PLUGIN
from lora_grpo.engines.server.launch import Server, Servers, Serving
from lora_grpo.errors import ConfigError, EngineError
from tests.families import build

HEALTHY = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_flags_that_the_engine_needs() -> None:
    serving = Serving("m", max_lora_rank=12, target_modules=("q_proj", "v_proj"), arguments=("--seed", "1"))
    command = serving.command(8000)
    assert "--enable-lora" in command
    assert option(command, "--max-lora-rank") == "16"
    assert (option(command, "--max-loras"), option(command, "--max-cpu-loras")) == ("2", "4")
    assert option(command, "--logprobs-mode") == "processed_logprobs"
    assert option(command, "--host") == "127.0.0.1"
    assert command[-5:] == ["--lora-target-modules", "q_proj", "v_proj", "--seed", "1"]
    assert serving.environment(0, 0)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_secrets_are_in_the_environment_alone(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of-the-store")
    token = {"store_url": "http://store:1", "store_token_file": os.path.relpath(tmp_path / "token")}
    serving = Serving("m", host="0.0.0.0", api_key="secret", **token)
    environment = serving.environment(0, 0)
    assert not any("secret" in part for part in serving.command(8000))
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment["LORA_GRPO_STORE_URL"] == "http://store:1"
    assert Path(environment["LORA_GRPO_STORE_TOKEN_FILE"]).is_absolute()


def test_replicas_share_neither_cores_nor_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    serving = Serving("m", replicas=2)
    assert [serving.environment(i, 0)["VLLM_CPU_OMP_THREADS_BIND"] for i in (0, 1)] == ["0,1", "2,3,4"]
    assert [serving.environment(i, 4)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [serving.environment(i, 2)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["5", "7"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert [serving.environment(i, 0)["VLLM_CPU_OMP_THREADS_BIND"] for i in (0, 1)] == ["3", "3"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"host": "0.0.0.0"}, "VLLM_API_KEY"),
        ({"store_token_file": "token"}, "store_url"),
        ({"store_token_file": "nofile", "store_url": "http://s:1"}, "the token file nofile cannot be read"),
        ({"arguments": ("--host", "0.0.0.0")}, "--host .*VLLM_API_KEY"),
        ({"arguments": ("--seed", "1", "--host=0.0.0.0")}, "--host=0.0.0.0"),
        ({"arguments": ("--port", "80")}, "--port"),
        ({"arguments": ("--uds=/tmp/socket",)}, "--uds"),
        ({"arguments": ("--api-key", "short")}, "--api-key"),
        ({"arguments": ("--api_key=short",)}, "--api_key"),
        ({"arguments": ("--ho", "::")}, "--ho "),
    ],
)
def test_what_cannot_be_served(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        Serving("m", **settings)


def test_more_replicas_than_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="there are 1"):
        Servers(Serving("m", replicas=2), tmp_path)


def test_a_server_that_ends_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The other one, which is up, ends with it."""
    servers = Servers(Serving("m", replicas=2, port=18461), tmp_path)
    up, broken = servers.all
    up.command = [sys.executable, "-c", HEALTHY, "18461"]
    broken.command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(EngineError, match=rf"{broken.url} ended with exit code 3(?s:.*)no such model"),
        servers.running(),
    ):
        pytest.fail("it cannot be up")
    assert up.exit_code is not None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV; the end"),
        (
            "print('Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor.')",
            "ended with exit code 0 after its worker VllmWorker-0 died of SIGILL .*--dtype float32",
        ),
        (
            "print('Worker proc VllmWorker-1 died unexpectedly (exit code: -9),\\n' + 'more\\n' * 40)",
            "ended with exit code 0 after its worker VllmWorker-1 died of SIGKILL; the end",
        ),
        ("print('Worker proc VllmWorker-0 died unexpectedly (exit code: -99)')", "died of signal 99"),
    ],
)
def test_a_death_is_told_by_its_signal(script: str, says: str, tmp_path: Path) -> None:
    """vLLM's worker takes the server with it, which then ends as if all was well; what an earlier life said is past."""
    log = tmp_path / "log"
    log.write_text("Worker proc VllmWorker-7 died unexpectedly (exit code: -6)\n")
    server = Server([sys.executable, "-c", script], os.environ, "http://here", log)
    server.start()
    assert server.wait(10)
    with pytest.raises(EngineError, match=f"http://here .*{says}") as raised:
        server.require_alive()
    assert "VllmWorker-7 died of" not in str(raised.value)


def test_our_plugin_is_loaded_where_plugins_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the kernel for a processor's tiles, without which vLLM's worker dies at its first request."""
    for chosen, given in (("other", f"other,{PLUGIN}"), ("", PLUGIN), (f"{PLUGIN},other", f"{PLUGIN},other")):
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
        assert Serving("m").environment(0, 0)["VLLM_PLUGINS"] == given
    monkeypatch.delenv("VLLM_PLUGINS")
    assert "VLLM_PLUGINS" not in Serving("m").environment(0, 0)
    assert [point.name for point in entry_points(group="vllm.general_plugins") if "lora_grpo" in point.value] == [
        PLUGIN
    ]


def test_the_first_that_ends_is_named_while_others_are_still_starting(tmp_path: Path) -> None:
    servers = Servers(Serving("m", replicas=2, port=18465), tmp_path)
    slow, broken = servers.all
    slow.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    broken.command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(EngineError, match=f"{broken.url} ended with exit code 3"), servers.running():
        pytest.fail("it cannot be up")


def test_a_server_that_never_answers_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    servers = Servers(Serving("m", port=18463, start_timeout_s=2.0), tmp_path)
    [stuck] = servers.all
    stuck.command = [sys.executable, "-c", "import time; print('fetching', flush=True); time.sleep(600)"]
    with (
        pytest.raises(EngineError, match=rf"{stuck.url} does not answer .*=2 s (?s:.*){stuck.log}:\nfetching"),
        servers.running(),
    ):
        pytest.fail("it cannot be up")
    assert stuck.exit_code is not None


def test_what_a_server_started_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    )
    server = Server([sys.executable, "-c", child + "print(p.pid, flush=True); time.sleep(600)"], os.environ, "", log)
    server.start()
    while not log.read_text().strip():
        time.sleep(0.05)
    server.signal(signal.SIGTERM)
    assert server.wait(10)
    for _ in range(100):
        if not cmdline(log):
            break
        time.sleep(0.05)
    assert not cmdline(log)


def cmdline(log: Path) -> str:
    """Of the process whose id is in the log; empty for one that ended, reaped or not."""
    path = Path(f"/proc/{log.read_text().strip()}/cmdline")
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--", "--host", "0.0.0.0"]])
def test_the_command_refuses_an_open_address_without_a_key(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["serve", str(llama_dir), *arguments])
    assert result.exit_code == 2
    assert "VLLM_API_KEY" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "VLLM_API_KEY"),
        (["--quantization", "int8"], "quantization='int8' is not proven"),
        (["--store-token-file", "nofile", "--store-url", "http://127.0.0.1:1"], "token file nofile cannot be read"),
        (["--", "--port", "1"], "--port cannot be handed on"),
    ],
)
def test_what_needs_no_look_at_the_base_is_refused_before_one(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes half a minute of imports."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(targets, "serving_arguments", lambda *_, **__: pytest.fail("the base is looked at"))
    result = CliRunner().invoke(app, ["serve", "someone/base", *arguments])
    assert (result.exit_code, says in " ".join(result.output.split())) == (2, True), result.output


@pytest.mark.parametrize("option", ["--max-loras=1", "--replicas=0", "--start-timeout=0"])
def test_the_command_refuses_numbers_that_cannot_work(llama_dir: Path, option: str) -> None:
    result = CliRunner().invoke(app, ["serve", str(llama_dir), option])
    assert result.exit_code == 2
    assert option.partition("=")[0] in result.output


def test_the_command_refuses_a_base_that_no_trainer_would_match(llama_dir: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(llama_dir), "--quantization", "fp4"])
    assert result.exit_code == 2
    assert "quantization='fp4' is not proven" in result.output


def test_the_command_refuses_a_base_without_lora_before_anything_starts(tmp_path: Path) -> None:
    base = build("falcon", tmp_path / "base")
    result = CliRunner().invoke(app, ["serve", str(base), "--log-dir", str(tmp_path / "logs")])
    assert (result.exit_code, (tmp_path / "logs").exists()) == (2, False)
    assert "vLLM serves no LoRA on FalconForCausalLM; choose another base" in result.output


@pytest.mark.parametrize("written", [["--revision", "v2"], ["--revision=v2"]])
def test_the_command_reads_the_revision_that_vllm_is_to_serve(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def refuse(model: str, quantization: str | None, **code: Any) -> None:
        seen.update(code)
        raise ConfigError("seen")

    monkeypatch.setattr(targets, "serving_arguments", refuse)
    result = CliRunner().invoke(app, ["serve", "someone/base", "--", "--seed", "1", *written, "--trust-remote-code"])
    assert result.exit_code == 2
    assert seen == {"revision": "v2", "trust_remote_code": True}
