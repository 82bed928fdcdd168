"""`lora-grpo serve MODEL` and `lora-grpo store-server RUN`."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_grpo.cli.options import Json, Run, opened, say, tell

if TYPE_CHECKING:
    from lora_grpo.engines.server.launch import Serving


def serve(
    model: Annotated[str, Argument(metavar="MODEL", help="Hub name or directory of the base model.")],
    arguments: Annotated[list[str] | None, Argument(metavar="[-- VLLM_ARGS]...", help="Passed on to vLLM.")] = None,
    replicas: Annotated[int, Option(min=1, help="Number of servers; they share the GPUs.")] = 1,
    host: Annotated[str, Option(help="Address to listen on; if not loopback, set an API key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="The first server's; the next gets port + 1.")] = 8000,
    max_lora_rank: Annotated[int, Option(min=1, help="The adapters' rank.")] = 16,
    max_loras: Annotated[int, Option(min=2, help="Adapter slots: versions in use at the same time.")] = 2,
    max_cpu_loras: Annotated[int | None, Option(min=1, help="Adapters in memory; default: slots + 2.")] = None,
    quantization: Annotated[str | None, Option(help="nf4: quantize the base while loading, for QLoRA.")] = None,
    api_key: Annotated[str | None, Option(envvar="VLLM_API_KEY", help="Safer in the environment.")] = None,
    store_url: Annotated[str | None, Option(help="Pull versions from the store server at this URL.")] = None,
    store_token_file: Annotated[str | None, Option(help="A file with the store server's token.")] = None,
    start_timeout: Annotated[float, Option(min=1, help="Seconds until all must answer, downloads included.")] = 1800.0,
    log_dir: Annotated[Path | None, Option(help="Folder for logs; default: a new temporary one.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the URLs as one line of JSON, when ready.")] = False,
) -> None:
    """Start vLLM servers that `VLLMServerEngine` can load adapters into. They run until Ctrl-C.

    When one server ends, all end; the last lines of its log say why.
    """
    from lora_grpo.config import check_quantization
    from lora_grpo.engines.server.launch import Servers, Serving

    check_quantization(quantization)
    others: dict[str, Any] = {"api_key": api_key, "store_url": store_url, "store_token_file": store_token_file}
    others |= {"arguments": tuple(arguments or ()), "start_timeout_s": start_timeout}
    serving = Serving(model, replicas, host, port, max_lora_rank, max_loras, max_cpu_loras, **others)
    serving = _of_base(serving, quantization)
    logs = log_dir or Path(tempfile.mkdtemp(prefix="lora-grpo-serve-"))
    logs.mkdir(parents=True, exist_ok=True)
    say(f"starting {replicas} of {model}; logs in {logs}")
    with Servers(serving, logs).running() as servers:
        tell({"urls": servers.urls, "logs": str(logs)}, as_json, "\n".join(servers.urls))
        servers.watch()


def _of_base(serving: Serving, quantization: str | None) -> Serving:
    """With what vLLM is told of the base. What it needs takes long to import: all else was checked before."""
    from lora_grpo.engines.local.targets import serving_arguments

    # What the arguments for vLLM say of the checkpoint, which is read before a server starts.
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--revision")
    known.add_argument("--trust-remote-code", action="store_true")
    code = vars(known.parse_known_args(serving.arguments)[0])
    told = serving_arguments(serving.model, quantization, **code)
    options = ["--language-model-only"] if "language_model_only" in told else []
    options += ["--quantization", told["quantization"]] if "quantization" in told else []
    layers = tuple(told["lora_target_modules"])
    return replace(serving, target_modules=layers, arguments=(*options, *serving.arguments))


def store_server(
    run: Run,
    host: Annotated[str, Option(help="Address to listen on; others can reach any but loopback.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free port.")] = 8731,
    token_file: Annotated[
        Path | None, Option(help="A file with the token; default: LORA_GRPO_STORE_TOKEN_FILE's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a run's versions, read-only, to servers that cannot read the run's disk. It runs until Ctrl-C.

    The run may still train in another process. Every request needs the token. Token and adapters are sent unencrypted:
    in a network that others can read, put a TLS proxy in front.
    """
    from lora_grpo.remote.client import read_token
    from lora_grpo.remote.server import StoreServer

    token = read_token(token_file)
    with opened(run) as store, StoreServer(store, token, host=host, port=port) as server:
        at = {"url": server.url, "run": server.run, "pid": os.getpid()}
        tell(at, as_json, f"serving {server.run} at {server.url}")
        say(f"replicas need LORA_GRPO_STORE_URL={server.url} and the token; they serve versions as {server.run}@NUMBER")
        server.wait()
