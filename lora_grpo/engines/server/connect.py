"""What a server must be to take adapters from us, found out by asking; what is missing is named by its flag."""

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.engines import compat
from lora_grpo.engines.server.client import Client, Missing, Refused, Unreachable, reading
from lora_grpo.engines.server.wire import COMPLETIONS, scoring_body, to_logprobs
from lora_grpo.errors import ConfigError, EngineError

LOAD, UNLOAD, MODELS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"

_TOO_HIGH_RANK = 1 << 20
_STARTED = re.compile(r"^process_start_time_seconds (\S+)", re.MULTILINE)
_SLOTS = re.compile(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself. `base` is the name and `root` the checkpoint of its base model, `release` vLLM's;
    `max_lora_rank` is None where it cannot be asked for; `started` tells one life of the process from the next."""

    base: str
    root: str
    max_model_len: int
    release: tuple[int, int]
    max_lora_rank: int | None
    started: str | None

    @property
    def model(self) -> str:
        return f"{self.root} with max_model_len={self.max_model_len}"


async def connect(client: Client, rank_folder: Path | None) -> Facts:
    """Check a server and describe it. `rank_folder` is what `write_rank_probe` wrote, which the server must be able to
    read; None where no disk is shared. Raises `ConfigError` naming the flag to start the server with,
    `UnsupportedVersion`, or `EngineError`."""
    try:
        await client.look("/health")
    except Unreachable as error:
        raise Unreachable(f"{error}; start a server there with `lora-grpo serve`") from None
    cards = (await models(client)).values()
    base = next((card for card in cards if card.get("max_model_len")), None)
    if base is None:
        raise EngineError(f"{client.url}{MODELS} lists no base model with a max_model_len; is it a vLLM server?")
    said = await client.look("/version")
    with reading(client.url, "/version", said):
        release = compat.check_release(str(json.loads(said)["version"]))
    rank = await _max_lora_rank(client, rank_folder)
    await _check_logprobs(client, base["id"])
    await _check_scoring(client, base["id"])
    life = await started(client)
    if life is None and rank_folder is None:
        why = "so that the restart of a server that pulls versions would pass unnoticed: let /metrics through"
        raise ConfigError(f"{client.url} has no /metrics that say when its process started, {why}")
    return Facts(base["id"], base.get("root") or base["id"], base["max_model_len"], release, rank, life)


async def models(client: Client) -> dict[str, dict[str, Any]]:
    """The cards of what a server serves, base and adapters, by name."""
    answer = await client.look(MODELS)
    with reading(client.url, MODELS, answer):
        return {card["id"]: dict(card) for card in json.loads(answer)["data"]}


async def started(client: Client) -> str | None:
    """When the server's process started, as it says; None where it has no metrics.

    Raises `ConfigError` where several processes answer for it: a version would reach one of them.
    """
    metrics = await _metrics(client)
    found = _STARTED.search(metrics)
    if metrics and found is None:
        raise ConfigError(
            f"{client.url} has several API servers, and a load reaches one: start it with --api-server-count 1"
        )
    return found and found[1]


async def slots_of(client: Client) -> int | None:
    """The server's max_loras, as it says once it has served an adapter; None where it does not."""
    found = _SLOTS.search(await _metrics(client))
    return int(found[1]) if found else None


async def _metrics(client: Client) -> str:
    try:
        return await client.look("/metrics")
    except Refused:
        return ""


def write_rank_probe(folder: Path) -> Path:
    """A folder with an adapter's config of an absurd rank, which no server loads; its refusal says what it would."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": _TOO_HIGH_RANK, "lora_alpha": _TOO_HIGH_RANK, "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def _max_lora_rank(client: Client, rank_folder: Path | None) -> int | None:
    """The server's, from its refusal of an absurd one; on the way it shows that it takes adapters from here at all."""
    body = {"lora_name": "lora-grpo.rank", "lora_path": str(rank_folder or "/nonexistent/lora-grpo")}
    try:
        await client.change(LOAD, body)
    except Refused as refusal:
        refused, said = refusal, str(refusal)
    else:
        raise EngineError(f"{client.url} accepted an adapter of rank {_TOO_HIGH_RANK}; is it a vLLM server?")
    if found := re.search(r"max_lora_rank (\d+)", said):
        return int(found[1])
    if "No adapter found" in said:
        if rank_folder is None:
            return None
        raise ConfigError(
            f"{client.url} cannot read {rank_folder}: start it on this host as this user, or use adapters='resolver'"
        )
    if "not enabled" in said:
        raise ConfigError(f"{client.url} serves without LoRA; start it with --enable-lora")
    if isinstance(refused, Missing):
        raise ConfigError(
            f"{client.url} has no {LOAD}; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
        )
    raise EngineError(f"{client.url} refuses to load adapters: {said}")


async def _check_logprobs(client: Client, base: str) -> None:
    """Halving the temperature doubles the distance between two log-probs of the distribution that is sampled from."""
    body = {"model": base, "prompt": [1, 2, 3], "max_tokens": 1, "seed": 0, "logprobs": 2, "top_p": 1.0, "top_k": 0}
    body |= {"min_p": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": True}
    try:
        answers = [await client.ask(COMPLETIONS, body | {"temperature": temperature}) for temperature in (1.0, 0.5)]
    except Unreachable as error:
        raise Unreachable(
            f'{client.url} was up and failed at the first request ({error}); its log says why. "exit code: -4" there: '
            "nobody asked the kernel for an Intel processor's AMX tiles. Start it with `lora-grpo serve`, with "
            "lora-grpo beside vLLM (named in VLLM_PLUGINS where that is set), or with --dtype float32"
        ) from None
    with reading(client.url, COMPLETIONS, answers):
        top = [answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in answers]
        shared = sorted(top[0].keys() & top[1].keys(), key=lambda token: top[0][token])
        apart, twice = (values[shared[-1]] - values[shared[0]] for values in top)
    if twice < 1.5 * apart:
        said = f"{client.url} gives log-probs of another distribution than it samples from"
        raise ConfigError(f"{said}; start it with --logprobs-mode processed_logprobs")


async def _check_scoring(client: Client, base: str) -> None:
    """Score a few prompts at once, which ends a server on vLLM's CPU backend whose output layer is wrapped for LoRA."""
    bodies = [scoring_body([1, 2, 3] * (row + 2)) | {"model": base} for row in range(4)]
    answers = await asyncio.gather(*(client.ask(COMPLETIONS, body) for body in bodies), return_exceptions=True)
    for body, answer in zip(bodies, answers, strict=True):
        if isinstance(answer, Unreachable):
            raise ConfigError(
                f"{client.url} failed to score several prompts at once ({answer}), as vLLM does on a CPU where the "
                "output layer is wrapped for LoRA: give --lora-target-modules the other linear layers (q_proj ...)"
            )
        if isinstance(answer, BaseException):
            raise answer
        to_logprobs(answer, body)
