"""`lora-grpo store-server RUN`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_grpo.cli.live import Json, Run
from lora_grpo.cli.output import print_json, say

PORT = 8731


def store_server(
    run: Run,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; another than loopback's can be reached by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", help="A file with the token; by default the one that LORA_GRPO_STORE_TOKEN_FILE names."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a run's versions, read-only, to replicas that share no disk with it, until Ctrl-C.

    The run may be going on in another process. Every request needs the token. It and the adapters travel unencrypted:
    across a network that others can read, put a TLS proxy in front.
    """
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.remote.server import StoreServer
    from lora_grpo.remote.token import read_token

    token = read_token(token_file)
    with AdapterStore(archive=run, readonly=True) as store, StoreServer(store, token, host=host, port=port) as server:
        if as_json:
            print_json({"url": server.url, "run": server.run, "pid": os.getpid()})
        else:
            typer.echo(f"serving {server.run} at {server.url}")
        say(f"replicas need LORA_GRPO_STORE_URL={server.url} and the token; they serve versions as {server.run}@NUMBER")
        server.wait()
