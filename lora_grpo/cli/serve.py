"""`lora-grpo serve MODEL` and `lora-grpo store-server RUN`."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_grpo.cli.options import Json, Run, opened, say, tell

if TYPE_CHECKING:
    from lora_grpo.engines.server.launch import Serving

PORT = 8731


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or directory of the base model.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM_ARGS]...", help="Further arguments for vLLM, after --, as they are."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Servers; each gets its share of GPUs.")] = 1,
    host: Annotated[str, typer.Option(help="Any other address than loopback's needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the first; the others count on.")] = 8000,
    max_lora_rank: Annotated[int, typer.Option(min=1, help="The adapters' rank.")] = 16,
    max_loras: Annotated[int, typer.Option(min=2, help="Adapter slots: versions in use at the same time.")] = 2,
    max_cpu_loras: Annotated[int | None, typer.Option(min=1, help="Adapters in memory; two more than slots.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4: quantize the base as it is loaded, for QLoRA.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="Better in the environment, which others cannot see.")
    ] = None,
    store_url: Annotated[str | None, typer.Option(help="Pull versions from a store server, by the resolver.")] = None,
    store_token_file: Annotated[str | None, typer.Option(help="A file with the store server's token.")] = None,
    start_timeout_s: Annotated[
        float, typer.Option("--start-timeout", min=1, help="Seconds until all have to answer, downloads included.")
    ] = 1800.0,
    log_dir: Annotated[Path | None, typer.Option(help="Where logs go; a new temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The servers as one line of JSON, once they answer.")] = False,
) -> None:
    """Start vLLM servers that take adapters as `VLLMServerEngine` loads them, until Ctrl-C.

    When one of them ends, all end: its log's last lines say why.
    """
    from lora_grpo.engines.local.targets import serving_arguments
    from lora_grpo.engines.server.launch import Serving

    told = serving_arguments(model, quantization, **_of_checkpoint(arguments or []))
    options = ["--language-model-only"] if "language_model_only" in told else []
    options += ["--quantization", told["quantization"]] if "quantization" in told else []
    serving = Serving(
        model,
        replicas,
        host,
        port,
        max_lora_rank,
        max_loras,
        max_cpu_loras,
        tuple(told["lora_target_modules"]),
        api_key,
        store_url,
        store_token_file,
        (*options, *(arguments or ())),
        start_timeout_s,
    )
    _until_interrupted(serving, log_dir or Path(tempfile.mkdtemp(prefix="lora-grpo-serve-")), as_json)


def _of_checkpoint(arguments: list[str]) -> dict[str, Any]:
    """What further arguments for vLLM say of the checkpoint, which is read before a server starts."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--revision")
    known.add_argument("--trust-remote-code", action="store_true")
    return vars(known.parse_known_args(arguments)[0])


def _until_interrupted(serving: Serving, logs: Path, as_json: bool) -> None:
    from lora_grpo.engines.server.launch import Servers

    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say(f"starting {serving.replicas} of {serving.model}; logs in {logs}")
    with Servers(serving, logs).running() as servers:
        tell({"urls": servers.urls, "logs": str(logs)}, as_json, "\n".join(servers.urls))
        servers.watch()


def store_server(
    run: Run,
    host: Annotated[
        str, typer.Option(help="The address to listen on; another than loopback's can be reached by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(help="A file with the token; by default the one that LORA_GRPO_STORE_TOKEN_FILE names."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a run's versions, read-only, to replicas that share no disk with it, until Ctrl-C.

    The run may be going on in another process. Every request needs the token. It and the adapters travel unencrypted:
    across a network that others can read, put a TLS proxy in front.
    """
    from lora_grpo.remote.server import StoreServer
    from lora_grpo.remote.token import read_token

    token = read_token(token_file)
    with opened(run) as store, StoreServer(store, token, host=host, port=port) as server:
        at = {"url": server.url, "run": server.run, "pid": os.getpid()}
        tell(at, as_json, f"serving {server.run} at {server.url}")
        say(f"replicas need LORA_GRPO_STORE_URL={server.url} and the token; they serve versions as {server.run}@NUMBER")
        server.wait()
