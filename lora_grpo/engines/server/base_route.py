"""Inside a vLLM server: a route by which a trainer asks what each of the server's workers reads of its base.

Our plugin puts it there, behind the server's API key, where adapters may be loaded at run time. A server without it
answers 404, and its base counts as not read.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from lora_grpo.engines.delivery.base_reading import BaseReading, read_base
from lora_grpo.engines.patching import wrap_once

BASE = "/v1/lora_grpo/base"

_METHOD = "lora_grpo_read_base"
_READING = TypeAdapter(BaseReading)


def offer() -> None:
    """For each of a server's processes: its workers can read their base, and its API has the route.

    Releases whose server is built otherwise than 0.32's get no route.
    """
    setattr(importlib.import_module("vllm.v1.worker.worker_base").WorkerBase, _METHOD, _read)

    def wrapping(stock: Any) -> Any:
        def register(args: Any, api: Any, *rest: Any) -> None:
            stock(args, api, *rest)
            from vllm import envs

            if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
                api.add_route(BASE, _answer, methods=["POST"])

        return register

    wrap_once(sys.modules.get("vllm.entrypoints.launchers.app"), "register_api_routers", wrapping)


def _read(worker: Any, shapes: str) -> str:
    """In a worker: what it reads, as JSON."""
    reading = read_base(worker.model_runner, json.loads(shapes), f"worker {worker.rank}")
    return json.dumps(asdict(reading))


async def _answer(request: Any) -> Any:
    from starlette.responses import JSONResponse

    shapes = json.dumps((await request.json())["tensors"])
    read = await request.app.state.engine_client.collective_rpc(_METHOD, args=(shapes,))
    return JSONResponse({"workers": [json.loads(one) for one in read]})


def readings(url: str, answer: Mapping[str, Any]) -> list[BaseReading]:
    """What the workers of the server at `url` read, from its answer. Raises `ValueError` for one of another form."""
    return [_READING.validate_python({**one, "where": f"{url} ({one['where']})"}) for one in answer["workers"]]


def not_read(url: str, shapes: Mapping[str, Sequence[int]]) -> BaseReading:
    return BaseReading(url, {}, dict.fromkeys(shapes, "the server does not have the lora_grpo plugin's route"))
