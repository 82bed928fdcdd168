"""A replica that shares no disk with the trainer: real `vllm serve`, real HTTP, versions pulled by name and proven."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from peft import PeftModel

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import served_name
from lora_grpo.engines.resolver import StoreResolver, register
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.remote.server import StoreServer
from tests.conftest import read_anew
from tests.tiny_models import load_model, refill_lora, tiny_lora

TOKEN = "0123456789abcdef"
VERSIONS = 4
SCALE = 0.3
PROMPT = list(range(40, 60))
START_TIMEOUT_S = 240
VARIABLES = ("URL", "TOKEN", "TOKEN_FILE", "CACHE", "CACHE_MIB")


@dataclass
class Trainer:
    """The trainer's side: versions whose B was filled with their number as the seed."""

    store: AdapterStore
    model: PeftModel
    base: Any

    def name(self, number: int) -> str:
        return served_name(self.store.run, number)

    def logprobs(self, number: int | None, tokens: list[int]) -> list[float]:
        """Log-probs of `tokens` after PROMPT, as the trainer computes them with a version or the base."""
        if number is not None:
            refill_lora(self.model, scale=SCALE, seed=number)
        model = self.base if number is None else self.model
        return teacher_logprobs(model, [[*PROMPT, *tokens]])[0][len(PROMPT) - 1 :]


@pytest.fixture(scope="module")
def trainer(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    model = tiny_lora(load_model(llama_dir), r=8)
    form = ServingForm(model, "default", torch.bfloat16)
    with AdapterStore(archive=tmp_path_factory.mktemp("trainer") / "run") as store:
        for number in range(1, VERSIONS + 1):
            refill_lora(model, scale=SCALE, seed=number)
            store.promote(store.publish(form.files(), step=number))
        store.flush()
        yield Trainer(store, model, load_model(llama_dir))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# Without a server: the resolver itself


class Settings(NamedTuple):
    url: str
    token: str
    cache: Path


@pytest.fixture
def settings(shm_dir: Path) -> Settings:
    return Settings(f"http://127.0.0.1:{free_port()}", TOKEN, shm_dir / "cache")


def serving(trainer: Trainer, settings: Settings, token: str = TOKEN) -> StoreServer:
    return StoreServer(trainer.store, token, port=int(settings.url.rpartition(":")[2]))


def test_requests_at_once_pull_once_and_later_ones_not_at_all(trainer: Trainer, settings: Settings) -> None:
    resolver, pulls = StoreResolver(*settings), []
    with serving(trainer, settings):
        ask = resolver._client.manifest
        resolver._client.manifest = lambda run, number: pulls.append(number) or ask(run, number)  # type: ignore[func-returns-value]

        async def five_at_once() -> list[Any]:
            names = [trainer.name(number) for number in (1, 2, 1, 1, 2)]
            return await asyncio.gather(*(resolver.resolve_lora("base", name) for name in names))

        found = asyncio.run(five_at_once())
    assert sorted(pulls) == [1, 2]
    assert [request.lora_name for request in found] == [trainer.name(number) for number in (1, 2, 1, 1, 2)]
    assert len({request.lora_path for request in found}) == 2
    again = asyncio.run(StoreResolver.resolve_lora(resolver, "base", trainer.name(1)))
    assert again.lora_path == found[0].lora_path
    assert Path(again.lora_path).is_relative_to(settings.cache)
    resolver._cache.close()  # type: ignore[union-attr]
    assert not Path(again.lora_path).exists()


def test_a_request_that_is_given_up_leaves_the_pull_to_the_others(trainer: Trainer, settings: Settings) -> None:
    resolver, may_go_on, pulls = StoreResolver(*settings), threading.Event(), []
    with serving(trainer, settings):
        ask = resolver._client.manifest

        def slow(run: str, number: int) -> Any:
            pulls.append(number)
            may_go_on.wait(30)
            return ask(run, number)

        resolver._client.manifest = slow  # type: ignore[method-assign]

        async def two_of_which_one_gives_up() -> Any:
            first = asyncio.create_task(resolver.resolve_lora("base", trainer.name(1)))
            second = asyncio.create_task(resolver.resolve_lora("base", trainer.name(1)))
            while not pulls:
                await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.sleep(0.05)
            may_go_on.set()
            return await second

        assert asyncio.run(two_of_which_one_gives_up()).lora_name == trainer.name(1)
    assert pulls == [1]


def test_it_is_light_where_it_is_not_used() -> None:
    """vLLM imports it in each of its processes, whether it is used or not."""
    code = "import sys, lora_grpo.engines.resolver; print([name for name in ('torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["base", "adapter", "run@latest", "../run@1"])
def test_other_names_are_other_resolvers_business(settings: Settings, name: str) -> None:
    """Nothing is asked: there is no store server."""
    assert asyncio.run(StoreResolver(*settings).resolve_lora("base", name)) is None


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    read_anew(monkeypatch)
    for name in VARIABLES:
        monkeypatch.delenv(f"LORA_GRPO_STORE_{name}", raising=False)
    return monkeypatch


def test_it_does_nothing_unless_a_store_is_named(environment: pytest.MonkeyPatch) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    environment.setattr(LoRAResolverRegistry, "resolvers", {})
    register()
    assert LoRAResolverRegistry.resolvers == {}
    environment.setenv("LORA_GRPO_STORE_URL", "http://trainer:8731")
    environment.setenv("LORA_GRPO_STORE_TOKEN", TOKEN)
    register()
    assert [type(resolver) for resolver in LoRAResolverRegistry.resolvers.values()] == [StoreResolver]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "there is no store token"),
        ({"LORA_GRPO_STORE_TOKEN": TOKEN, "LORA_GRPO_STORE_URL": "trainer"}, "the store's address 'trainer'"),
        ({"LORA_GRPO_STORE_TOKEN_FILE": "/nowhere/token"}, "the token file /nowhere/token cannot be read"),
        ({"LORA_GRPO_STORE_TOKEN": TOKEN, "LORA_GRPO_STORE_CACHE_MIB": "4 GiB"}, "LORA_GRPO_STORE_CACHE_MIB='4 GiB'"),
        ({"LORA_GRPO_STORE_TOKEN": TOKEN, "VLLM_SKIP_MODEL_NAME_VALIDATION": "1"}, "answered by the base model"),
    ],
)
def test_settings_that_cannot_work_stop_the_server(
    environment: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in {"LORA_GRPO_STORE_URL": "http://trainer:8731", **variables}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        register()


# With a real server


@dataclass
class Replica:
    """A `vllm serve` process in a directory tree of its own."""

    url: str
    tree: Path
    settings: Settings
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        return (self.tree / "log").read_text()

    def ask(self, model: str) -> httpx.Response:
        """12 greedy tokens after PROMPT."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0, "logprobs": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def answer(self, model: str) -> tuple[list[int], list[float]]:
        response = self.ask(model)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert response.json()["model"] == model
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def folder_of(self, model: str) -> Path:
        """Where the server says that it has a model's weights from."""
        cards = httpx.get(f"{self.url}/v1/models").json()["data"]
        return next(Path(card["root"]) for card in cards if card["id"] == model)


@pytest.fixture(scope="module")
def replica(llama_dir: Path, trainer: Trainer) -> Iterator[Replica]:
    """Up in half a minute. It is told the store's address and token; none of the trainer's paths."""
    tree = Path("/dev/shm") / f"lora-grpo-test-replica-{os.getpid()}"
    shutil.copytree(llama_dir, tree / "model")
    (tree / "home").mkdir()
    (tree / "token").write_text(TOKEN)
    settings = Settings(f"http://127.0.0.1:{free_port()}", TOKEN, tree / "cache")
    port = free_port()
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tree / "home"),
        "TMPDIR": str(tree / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "LORA_GRPO_STORE_URL": settings.url,
        "LORA_GRPO_STORE_TOKEN_FILE": str(tree / "token"),
        "LORA_GRPO_STORE_CACHE": str(settings.cache),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tree / "model")]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "128", "--logprobs-mode", "processed_logprobs"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--max-cpu-loras", "2"]
    told = " ".join([*command, *variables.values()])
    assert not any(str(path) in told for path in (trainer.store.root, trainer.store.archive, llama_dir))
    with open(tree / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tree / "home", env=variables, stdout=log, stderr=log)
    replica = Replica(f"http://127.0.0.1:{port}", tree, settings, process)
    try:
        wait_for(replica)
        yield replica
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left = [path.name for path in settings.cache.iterdir()]
        shutil.rmtree(tree)
    assert left == [], "the replica's versions outlived it"


def wait_for(replica: Replica) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert replica.process.poll() is None, replica.log()[-4000:]
        try:
            if httpx.get(f"{replica.url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(replica.log()[-4000:])


@pytest.fixture(scope="module")
def noise(replica: Replica, trainer: Trainer) -> float:
    """Engine against trainer on the base alone: what rounding makes of equal policies, in nats per token."""
    tokens, logprobs = replica.answer("base")
    return mean_abs_difference([logprobs], [trainer.logprobs(None, tokens)])


def assert_made_by(number: int, answer: tuple[list[int], list[float]], trainer: Trainer, noise: float) -> None:
    """The answer's log-probs are those of one version, and of no other nor of the base."""
    tokens, logprobs = answer
    candidates = [None, *range(1, VERSIONS + 1)]
    errors = {n: mean_abs_difference([logprobs], [trainer.logprobs(n, tokens)]) for n in candidates}
    print({str(n): round(error, 4) for n, error in errors.items()}, f"noise {noise:.4f}")
    assert errors[number] <= 4 * noise
    assert min(error for n, error in errors.items() if n != number) >= 20 * noise


@pytest.mark.vllm
def test_a_version_is_pulled_served_and_is_the_trainers(replica: Replica, trainer: Trainer, noise: float) -> None:
    """Of two versions, each asked for by several requests at the same moment."""
    asked = [1, 2, 1, 2, 2, 1]
    with serving(trainer, replica.settings), ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda number: replica.answer(trainer.name(number)), asked))
    for number, answer in zip(asked, answers, strict=True):
        assert_made_by(number, answer, trainer, noise)
    for number in (1, 2):
        assert replica.log().count(f"pulled {trainer.name(number)} from") == 1
        assert replica.folder_of(trainer.name(number)).is_relative_to(replica.settings.cache)


@pytest.mark.vllm
def test_what_cannot_be_had_is_refused_and_can_be_had_later(replica: Replica, trainer: Trainer, noise: float) -> None:
    name = trainer.name(3)
    weights = trainer.store.get(3).path / "adapter_model.safetensors"
    sound = weights.read_bytes()

    def refused(why: str) -> None:
        before = len(replica.log())
        response = replica.ask(name)
        assert (response.status_code, "choices" in response.json()) == (404, False)
        assert f"{name} is refused, and no model answers for it" in replica.log()[before:]
        assert why in replica.log()[before:]

    refused("cannot be reached")
    with serving(trainer, replica.settings, token="another"):
        refused("refuses this token")
    with serving(trainer, replica.settings):
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        refused("is not what was published")
        weights.write_bytes(sound)
        assert_made_by(3, replica.answer(name), trainer, noise)
        for other in (trainer.name(99), served_name("another-run", 1)):
            assert replica.ask(other).status_code == 404
        assert "holds the run" in replica.log()


@pytest.mark.vllm
def test_what_was_pulled_is_read_again_without_the_store(replica: Replica, trainer: Trainer, noise: float) -> None:
    """The engine keeps two adapters in memory: each of these asks for one that it has evicted."""
    with serving(trainer, replica.settings):
        for number in (1, 2, 3, 4):
            replica.answer(trainer.name(number))
    for number in (1, 2, 3, 4):
        assert_made_by(number, replica.answer(trainer.name(number)), trainer, noise)
    unloaded = httpx.post(f"{replica.url}/v1/unload_lora_adapter", json={"lora_name": trainer.name(1)})
    assert unloaded.status_code == 200
    assert_made_by(1, replica.answer(trainer.name(1)), trainer, noise)
    tokens, logprobs = replica.answer("base")
    assert mean_abs_difference([logprobs], [trainer.logprobs(None, tokens)]) == pytest.approx(noise, abs=1e-6)
