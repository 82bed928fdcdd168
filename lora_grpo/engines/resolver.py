"""A vLLM LoRA resolver: a server asked for the model `RUN@NUMBER` pulls that version from the trainer's store.

For replicas that share no disk with the trainer. vLLM finds it by its entry point wherever this package is installed;
examples/topologies/README.md has its variables. A version that cannot be had, or is not what was published, is refused:
the reason is in the server's log, and the request is answered with 404, by no model. Read in vLLM 0.26 to 0.33: a name
is resolved for one request at a time, and every adapter gets an id of the server's own counter, so name and path tell
versions apart, and both are never used twice."""

import asyncio
import importlib
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_grpo.adapters.version import parse_served_name, served_name
from lora_grpo.engines import compat
from lora_grpo.engines.compat.patching import wrap_once
from lora_grpo.errors import ConfigError, LoraGrpoError
from lora_grpo.remote.client import MIB, ReplicaCache, StoreClient, read_token

PLUGIN = "lora_grpo_store_resolver"
URL_VARIABLE = "LORA_GRPO_STORE_URL"
CACHE_VARIABLE = "LORA_GRPO_STORE_CACHE"
CACHE_MIB_VARIABLE = "LORA_GRPO_STORE_CACHE_MIB"
BASE_ROUTE = "/v1/lora_grpo/base"
"""Where a trainer asks what the server's workers read of its base, behind the server's API key; 404 where adapters
cannot be loaded at run time."""
_READ_BASE = "lora_grpo_read_base"
_LOG = logging.getLogger(f"vllm.plugins.{__name__}")
"""Its level and format are the server's."""


def register() -> None:
    """vLLM calls it in each of its processes; `ConfigError` for settings that cannot work stops the server's start."""
    compat.mend_server()
    _offer_base_reading()
    url, mib = os.environ.get(URL_VARIABLE), os.environ.get(CACHE_MIB_VARIABLE, "")
    if not url:
        return
    from vllm import envs
    from vllm.lora.resolver import LoRAResolverRegistry

    if mib and not (mib.isascii() and mib.isdigit() and int(mib)):
        raise ConfigError(f"{CACHE_MIB_VARIABLE}={mib!r} must be a whole number of MiB, such as 4096")
    cache = Path(os.environ.get(CACHE_VARIABLE) or f"/dev/shm/lora-grpo-replica-{os.geteuid()}")
    resolver = StoreResolver(url, read_token(), cache.absolute(), int(mib) * MIB if mib else None)
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        why = "requests that name a version would be answered by the base model; unset it"
        raise ConfigError(f"VLLM_SKIP_MODEL_NAME_VALIDATION is set together with {URL_VARIABLE}: {why}")
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        _LOG.warning("no version is pulled: %s takes VLLM_ALLOW_RUNTIME_LORA_UPDATING=True besides", URL_VARIABLE)
    LoRAResolverRegistry.register_resolver("lora_grpo store", resolver)


def _offer_base_reading() -> None:
    """For workers and for the API, which has no route in releases whose server is built otherwise than 0.32's."""
    setattr(importlib.import_module("vllm.v1.worker.worker_base").WorkerBase, _READ_BASE, _read_base)

    def register_api_routers(stock: Any, args: Any, api: Any, *rest: Any) -> None:
        stock(args, api, *rest)
        from vllm import envs

        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            api.add_route(BASE_ROUTE, _answer, methods=["POST"])

    wrap_once(sys.modules.get("vllm.entrypoints.launchers.app"), "register_api_routers", register_api_routers)


def _read_base(worker: Any, shapes: str) -> str:
    from lora_grpo.engines.names import read_base

    return json.dumps(asdict(read_base(worker.model_runner, json.loads(shapes), f"worker {worker.rank}")))


async def _answer(request: Any) -> Any:
    from starlette.responses import JSONResponse

    shapes = json.dumps((await request.json())["tensors"])
    read = await request.app.state.engine_client.collective_rpc(_READ_BASE, args=(shapes,))
    return JSONResponse({"workers": [json.loads(one) for one in read]})


class StoreResolver:
    """vLLM's resolver protocol over a store server. Versions asked for at once are pulled once, one after the other."""

    def __init__(self, url: str, token: str, cache: Path, budget_bytes: int | None = None) -> None:
        """`budget_bytes` of what was pulled are kept in `cache`; half of its file system if None."""
        self._client = StoreClient(url, token)
        self._cache: ReplicaCache | None = None
        self._cache_place = cache, budget_bytes
        self._pulling = threading.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """A `vllm.lora.request.LoRARequest` for `RUN@NUMBER`; None for other names and for what is refused."""
        if (asked := parse_served_name(lora_name)) is None:
            return None
        try:
            path = await asyncio.to_thread(self._have, *asked)
        except LoraGrpoError as error:
            _LOG.error("%s is refused, and no model answers for it: %s", lora_name, error)
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name, asked[1], str(path))

    def _have(self, run: str, number: int) -> Path:
        """Where a version lies, once it does. A request that is given up leaves the pull to those that wait for it."""
        with self._pulling:
            if self._cache is None:
                self._cache = ReplicaCache(*self._cache_place)
            path = self._cache.path(run, number)
            if path is None:
                started = time.monotonic()
                path = self._cache.pull(self._client, run, number)
                size_mib = sum(file.stat().st_size for file in path.iterdir()) / MIB
                name, seconds = served_name(run, number), time.monotonic() - started
                _LOG.info("pulled %s from %s: %.1f MiB in %.2f s", name, self._client.url, size_mib, seconds)
            return path
