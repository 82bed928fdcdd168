"""One server: whether it takes adapters from us, where what it lacks is named by its flag, and what it has loaded."""

import asyncio
import hashlib
import itertools
import json
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from lora_grpo.adapters.files.disk import read_small, tmpfs_home
from lora_grpo.adapters.files.locks import OwnFolder, is_free
from lora_grpo.adapters.version import CONFIG_FILE, AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.names import BaseReading
from lora_grpo.engines.resolver import BASE_ROUTE
from lora_grpo.engines.server.client import COMPLETIONS, Client, Missing, Refused, Unreachable, together
from lora_grpo.errors import ConfigError, DeliveryError, EngineError
from lora_grpo.types import LogProbs

LOAD, UNLOAD, MODELS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
_TOO_HIGH_RANK = 1 << 20
_FOLDER = "lora-grpo-engine-"


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
    """Check a server and describe it. It must be able to read `rank_folder` (None where no disk is shared). Raises
    `ConfigError` naming the flag to start it with, `UnsupportedVersion`, or `EngineError`."""
    try:
        await client.look("/health")
    except Unreachable as error:
        raise Unreachable(f"{error}; start a server there with `lora-grpo serve`") from None
    base = next((card for card in (await models(client)).values() if card.get("max_model_len")), None)
    if base is None:
        raise EngineError(f"{client.url}{MODELS} lists no base model with a max_model_len; is it a vLLM server?")
    said = await client.look("/version")
    with client.reading("/version", said):
        release = compat.check_release(str(json.loads(said)["version"]))
    rank = await _max_lora_rank(client, rank_folder)
    await _check_logprobs(client, base["id"])
    await _check_scoring(client, base["id"])
    life = await started(client)
    if life is None and rank_folder is None:
        raise ConfigError(f"{client.url} has no /metrics, so nobody would notice its restart: let /metrics through")
    return Facts(base["id"], base.get("root") or base["id"], base["max_model_len"], release, rank, life)


async def models(client: Client) -> dict[str, dict[str, Any]]:
    """The cards of what a server serves, base and adapters, by name."""
    answer = await client.look(MODELS)
    with client.reading(MODELS, answer):
        return {card["id"]: dict(card) for card in json.loads(answer)["data"]}


async def started(client: Client) -> str | None:
    """When the server's process started; None where it has no metrics. Raises `ConfigError` where it is several."""
    metrics = await _metrics(client)
    found = re.search(r"^process_start_time_seconds (\S+)", metrics, re.MULTILINE)
    if metrics and found is None:
        raise ConfigError(f"{client.url} has several API servers; loads reach one: start it with --api-server-count 1")
    return found and found[1]


async def slots_of(client: Client) -> int | None:
    """The server's max_loras, as it says once it has served an adapter; None where it does not."""
    found = re.search(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', await _metrics(client), re.MULTILINE)
    return int(found[1]) if found else None


async def _metrics(client: Client) -> str:
    try:
        return await client.look("/metrics")
    except Refused:
        return ""


async def _max_lora_rank(client: Client, rank_folder: Path | None) -> int | None:
    """The server's, from its refusal of an absurd one; on the way it shows that it takes adapters from here at all."""
    body = {"lora_name": "lora-grpo.rank", "lora_path": str(rank_folder or "/nonexistent/lora-grpo")}
    try:
        await client.change(LOAD, body)
        raise EngineError(f"{client.url} accepted an adapter of rank {_TOO_HIGH_RANK}; is it a vLLM server?")
    except Refused as refusal:
        is_missing, said = isinstance(refusal, Missing), str(refusal)
    if found := re.search(r"max_lora_rank (\d+)", said):
        return int(found[1])
    if "No adapter found" in said and rank_folder is None:
        return None
    if "No adapter found" in said:
        lack = f"cannot read {rank_folder}: start it on this host as this user, or use adapters='resolver'"
    elif "not enabled" in said:
        lack = "serves without LoRA; start it with --enable-lora"
    elif is_missing:
        lack = f"has no {LOAD}; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
    else:
        raise EngineError(f"{client.url} refuses to load adapters: {said}")
    raise ConfigError(f"{client.url} {lack}")


async def _check_logprobs(client: Client, base: str) -> None:
    """Halving the temperature doubles the distance between two log-probs of the distribution that is sampled from."""
    body = {"model": base, "prompt": [1, 2, 3], "max_tokens": 1, "seed": 0, "logprobs": 2, "top_p": 1.0, "top_k": 0}
    body |= {"min_p": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": True}
    try:
        answers = [await client.ask(COMPLETIONS, body | {"temperature": temperature}) for temperature in (1.0, 0.5)]
    except Unreachable as error:
        said = f"{client.url} was up and failed at the first request ({error}); its log says why"
        fix = "start it with `lora-grpo serve`, lora-grpo beside vLLM and in VLLM_PLUGINS if set, or --dtype float32"
        raise Unreachable(f'{said} ("exit code: -4" there: AMX tiles that the kernel does not allow; {fix})') from None
    with client.reading(COMPLETIONS, answers):
        top = [answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in answers]
        shared = sorted(top[0].keys() & top[1].keys(), key=lambda token: top[0][token])
        apart, twice = (values[shared[-1]] - values[shared[0]] for values in top)
    if twice < 1.5 * apart:
        fix = "start it with --logprobs-mode processed_logprobs"
        raise ConfigError(f"{client.url} gives log-probs of another distribution than it samples from; {fix}")


async def _check_scoring(client: Client, base: str) -> None:
    """Score a few prompts at once, which ends a server on vLLM's CPU backend whose output layer is wrapped for LoRA."""
    try:
        await together([client.score(base, [1, 2, 3] * (row + 2)) for row in range(4)])
    except Unreachable as error:
        why = "as vLLM does on a CPU where the output layer is wrapped for LoRA"
        fix = "start it with --lora-target-modules and the other linear layers (q_proj ...)"
        raise ConfigError(f"{client.url} failed to score several prompts at once ({error}), {why}: {fix}") from None


@dataclass(eq=False)
class Served:
    """A version in use: the log-probs that it is known by (none: yet to be), how many calls need it, and the name by
    which servers pull it; without one they load it from its path."""

    version: AdapterVersion
    answers: LogProbs
    pulled_as: str | None
    users: int = 0


@dataclass(eq=False)
class Replica:
    """`names` are what the server knows versions by, `base_read` what its base was and what was asked then."""

    client: Client
    facts: Facts
    returning: asyncio.Task[None] | None = None
    trouble: str = ""
    names: dict[Served, str] = field(default_factory=dict)
    in_flight: int = 0
    serves_base: bool = False
    base_read: tuple[Mapping[str, Sequence[int]], list[BaseReading]] | None = None

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def state(self) -> Literal["serving", "away", "lost"]:
        """In rotation; out of it and being brought back; given up until the next load asks for it."""
        if self.returning is None:
            return "serving"
        return "lost" if self.returning.done() else "away"

    async def load(self, version: AdapterVersion, name: str) -> None:
        try:
            await self.client.change(LOAD, {"lora_name": name, "lora_path": str(version.path)})
        except Unreachable:
            # The answer may be lost on the way.
            if name not in await models(self.client):
                raise

    async def pull(self, name: str) -> None:
        """By the server's resolver: one token is asked of it."""
        try:
            await self.client.score(name, [1, 2])
        except Missing as refusal:
            why = "its log says why (is LORA_GRPO_STORE_URL set there, and the store server up?)"
            raise EngineError(f"{self.url} cannot resolve {name}: {refusal}; {why}") from None

    async def unload(self, name: str) -> None:
        """Have the server forget a name. What it holds in memory stays until newer adapters take its place."""
        with suppress(Missing):
            await self.client.change(UNLOAD, {"lora_name": name}, quick=True)

    async def forget(self, served: Served) -> None:
        if name := self.names.pop(served, ""):
            await self.unload(name)

    async def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        body = {"tensors": {name: list(shape) for name, shape in shapes.items()}}
        try:
            answer = await self.client.ask(BASE_ROUTE, body)
        except Missing:
            why = "the server does not have the lora_grpo plugin's route"
            return [BaseReading(self.url, {}, dict.fromkeys(shapes, why))]
        with self.client.reading(BASE_ROUTE, answer):
            workers = [{**one, "where": f"{self.url} ({one['where']})"} for one in answer["workers"]]
            return TypeAdapter(list[BaseReading]).validate_python(workers)

    async def require_same_base(self) -> None:
        """Raises `DeliveryError` unless the base reads as it did when it was compared with the trainer's."""
        if self.base_read is None:
            return
        shapes, read = self.base_read
        if [one.tensors for one in await self.read_base(shapes)] != [one.tensors for one in read]:
            raise DeliveryError(f"{self.url} came back with a base of other values than it had, under the same name")

    async def look(self) -> None:
        """Raises `Unreachable` when the server is away, or has forgotten what it had since it was last looked at."""
        await self.client.look("/health")
        listed = await models(self.client)
        if missing := set(self.names.values()) - listed.keys():
            raise Unreachable(f"{self.url} no longer knows {', '.join(sorted(missing))}: it restarted")
        await self.require_life(self.facts.started)

    async def require_life(self, life: str | None) -> None:
        """Raises `Unreachable` unless the process that answers is the one that started then."""
        if await started(self.client) != life:
            raise Unreachable(f"{self.url} restarted, or is the address of several servers")

    async def reconnect(self, rank_folder: Path | None) -> None:
        facts = await connect(self.client, rank_folder)
        if facts.model != self.facts.model:
            raise DeliveryError(f"{self.url} came back with {facts.model} where it had {self.facts.model}")
        listed = await models(self.client)
        self.names = {served: name for served, name in self.names.items() if name in listed}
        self.facts = facts


class Names:
    """Gives out the names that servers know versions by. A server's caches key on them, so every load takes a new one,
    of this place, a token that only this engine has, and a counter. The token is that of a locked folder: where the
    lock is free, the process is dead and what it left on servers can go. The place is the file system that the folder
    lies in, as this boot of the kernel numbers it: containers of one host name see no lock in another's."""

    rank_folder: Path | None = None

    def __init__(self) -> None:
        self._parent = tmpfs_home()
        OwnFolder.sweep(self._parent, _FOLDER)
        own = OwnFolder(self._parent, _FOLDER)
        self.folder, self.close = own.path, own.close
        host = re.sub("[^A-Za-z0-9-]+", "-", socket.gethostname())
        boot = read_small(Path("/proc/sys/kernel/random/boot_id")) or b""
        system = hashlib.blake2b(boot + str(self.folder.stat().st_dev).encode(), digest_size=4)
        self._place, self._token = f"{host}-{system.hexdigest()}", self.folder.name.removeprefix(_FOLDER)
        self._counter = itertools.count(1)

    def write_rank_probe(self) -> None:
        """An adapter's config of an absurd rank, for servers on this disk to refuse; see `connect`."""
        self.rank_folder = self.folder / "rank"
        self.rank_folder.mkdir()
        config = {"peft_type": "LORA", "r": _TOO_HIGH_RANK, "lora_alpha": _TOO_HIGH_RANK, "target_modules": []}
        (self.rank_folder / CONFIG_FILE).write_text(json.dumps(config))

    def fresh(self, version: AdapterVersion) -> str:
        run = re.sub("[^A-Za-z0-9_-]+", "-", version.path.parent.parent.name)
        return f"lora-grpo.{self._place}.{self._token}.{run}.v{version.number}.{next(self._counter)}"

    def is_leftover(self, name: str) -> bool:
        owner = re.fullmatch(r"lora-grpo\.([A-Za-z0-9-]+)\.([a-z0-9_]+)\..+", name)
        return owner is not None and owner[1] == self._place and is_free(self._parent / f"{_FOLDER}{owner[2]}")
