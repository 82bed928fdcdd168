"""A server that speaks as much of vLLM's HTTP as the engine uses, and fails when it is told to.

What it "computes" is a function of the adapter file's bytes and of the tokens, so that every version answers otherwise.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

NOT_THERE = JSONResponse({"detail": "Not Found"}, 404)


def logprob(weights: str, previous: int, token: int) -> float:
    """In [-2, -1), for an adapter's digest ("" for the base)."""
    digest = hashlib.blake2b(f"{weights},{previous},{token}".encode(), digest_size=4).digest()
    return -1 - int.from_bytes(digest, "big") / 2**32


def scores(weights: str, sequences: list[list[int]]) -> list[list[float]]:
    return [[logprob(weights, *pair) for pair in itertools.pairwise(ids)] for ids in sequences]


def weights_of(path: Path) -> str:
    return hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()


@dataclass
class FakeServer:
    """What the server is, and how it misbehaves; both may be changed while it runs."""

    root: str
    rank: int = 16
    release: str = "0.33.0"
    runtime_loading: bool = True
    lora: bool = True
    processed_logprobs: bool = True
    sees_files: bool = True
    slots: int = 2
    resolves_from: Path | None = None
    has_metrics: bool = True
    api_key: str | None = None

    dies_computing: bool = False
    plugin: bool = False
    base: str = "of one checkpoint"

    down: bool = False
    frozen: bool = False
    version_text: str | None = None
    failing_loads: int = 0
    wrong_weights: int = 0
    answers_as: str | None = None
    delay_s: float = 0.0

    started: float = 1.0
    adapters: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def __enter__(self) -> FakeServer:
        routes = [
            Route("/health", self._health),
            Route("/version", self._version),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/lora_grpo/base", self._base, methods=["POST"]),
        ]
        self._app = Starlette(routes=routes)
        self._server = uvicorn.Server(uvicorn.Config(self._answered, interface="asgi3", port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            pass
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.frozen = False
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def _answered(self, scope: Any, receive: Any, send: Any) -> None:
        """What came while the server is frozen, or was in work then, is never answered."""

        async def sent(message: Any) -> None:
            while self.frozen:
                await asyncio.sleep(0.02)
            await send(message)

        await self._app(scope, receive, sent)

    def restart(self) -> None:
        """Another process, which knows no adapter."""
        self.started += 1
        self.adapters.clear()
        self.weights.clear()

    def completions(self) -> list[dict[str, Any]]:
        """The requests for completions, those that score left out."""
        return [body for body in self.asked if body.get("return_token_ids") and "prompt_logprobs" not in body]

    def _refusal(self, request: Request) -> Response | None:
        if self.down:
            return JSONResponse({"error": {"message": "down"}}, 503, {"x-should-retry": "false"})
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def _health(self, _: Request) -> Response:
        return Response(status_code=503 if self.down else 200)

    async def _version(self, _: Request) -> Response:
        return PlainTextResponse(self.version_text or json.dumps({"version": self.release}))

    async def _metrics(self, _: Request) -> Response:
        if not self.has_metrics:
            return NOT_THERE
        lines = [f"process_start_time_seconds {self.started}"]
        lines.append(f'vllm:lora_requests_info{{engine="0",max_lora="{self.slots}",waiting_lora_adapters=""}} 1.0')
        return PlainTextResponse("\n".join(lines))

    async def _models(self, request: Request) -> Response:
        base = {"id": "base", "root": self.root, "parent": None, "max_model_len": 128}
        cards = [base, *({"id": name, "root": path, "parent": "base"} for name, path in self.adapters.items())]
        return self._refusal(request) or JSONResponse({"data": cards})

    async def _base(self, request: Request) -> Response:
        """As one worker that reads all, each tensor in one slice."""
        if not self.plugin:
            return self._refusal(request) or NOT_THERE
        shapes = (await request.json())["tensors"]
        read = {name: {"dtype": "bfloat16", "slices": [[shape[0], self.base]]} for name, shape in shapes.items()}
        worker = {"tensors": read, "unread": {}, "unasked": [], "seconds": 0.5}
        return self._refusal(request) or JSONResponse({"workers": [{"where": "worker 0", **worker}]})

    async def _load(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        if not self.runtime_loading:
            return NOT_THERE
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        await asyncio.sleep(self.delay_s)
        if problem := self._why_not(name, path):
            return problem
        self.adapters[name] = str(path)
        self.weights[name] = "wrong" if self.wrong_weights > 0 else weights_of(path)
        self.wrong_weights -= 1
        return PlainTextResponse("Success")

    def _why_not(self, name: str, path: Path) -> Response | None:
        if not self.lora:
            return _error(500, "Call to add_lora method failed: LoRA is not enabled.")
        if not (self.sees_files and path.is_dir()):
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        if (rank := json.loads((path / "adapter_config.json").read_text())["r"]) > self.rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.rank}.")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if self.failing_loads > 0:
            self.failing_loads -= 1
            return _error(500, "Call to add_lora method failed: out of memory")
        return None

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return self._refusal(request) or PlainTextResponse("Success")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.down = self.down or self.dies_computing
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            if refusal := self._refusal(request):
                return refusal
            if self.resolves_from is not None:
                self._resolve(body["model"], self.resolves_from)
            if body["model"] != "base" and body["model"] not in self.adapters:
                return _error(404, f"The model `{body['model']}` does not exist.")
            return JSONResponse(self._answer(body))
        finally:
            self.in_flight -= 1

    def _resolve(self, name: str, versions: Path) -> None:
        """As a resolver plugin does for RUN@NUMBER."""
        path = versions / f"{int(name.rpartition('@')[2]):06d}" if "@" in name else None
        if path is not None and path.is_dir() and name not in self.adapters:
            self.adapters[name], self.weights[name] = str(path), weights_of(path)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        weights = self.weights.get(body["model"], "")
        ids = [body["prompt"][-1]]
        for position in range(body["max_tokens"]):
            ids.append(4 + (body.get("seed", 0) + position) % 200)
        made, values = ids[1:], scores(weights, [ids])[0]
        if body.get("return_tokens_as_token_ids"):
            scale = 1 / body["temperature"] if self.processed_logprobs else 1.0
            top = {f"token_id:{i}": value * scale - math.log(2) for i, value in enumerate((0.0, -0.5, -1.5))}
            return {"model": "base", "choices": [{"logprobs": {"top_logprobs": [top]}}]}
        prompt = body["prompt"]
        scored = [
            None,
            *({str(b): {"logprob": logprob(weights, a, b)}} for a, b in itertools.pairwise(prompt)),
        ]
        choice = {
            "text": bytes(token % 128 for token in made).decode(),
            "token_ids": made,
            "logprobs": {"token_logprobs": values},
            "finish_reason": "length",
            "prompt_token_ids": prompt,
            "prompt_logprobs": scored if "prompt_logprobs" in body else None,
        }
        return {"model": self.answers_as or body["model"], "choices": [choice]}


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status)
