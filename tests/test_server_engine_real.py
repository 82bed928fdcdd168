"""Two real vLLM servers on loopback as one engine: proven, all or none, back after a kill, open to other clients.

They read versions where the store keeps them, or pull them from a store server.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import ModelConfig
from lora_grpo.engines.resolver import URL_VARIABLE
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.server.launch import Server, Servers, Serving
from lora_grpo.engines.server.replica import Names
from lora_grpo.errors import ConfigError, EngineError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.remote.server import StoreServer
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.population.population import Population
from lora_grpo.types import Group, Sampling
from tests.test_population import distances, require_as_alone, specs
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model
from tests.tiny_trainer import CONFIG, tiny_trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

VLLM_ARGS = (
    "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "64", "--gpu-memory-utilization", "0.1",
    "--dtype", "float32",
)  # fmt: skip
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKEN = "a-token-of-the-tests"
PROMPTS = ["one, two, ", "a b c d ", "the sum of 1 and 2 is "]
SAMPLING = Sampling(n=4, max_tokens=8, seed=3)


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first: int = probe.getsockname()[1]
        try:
            for port in range(first + 1, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, in which a run repeats to the bit on every CPU."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), dtype="float32")


@pytest.fixture(scope="module")
def servers(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two replicas as `lora-grpo serve` starts them, and a third, plain one that knows nothing of LoRA."""
    logs = tmp_path_factory.mktemp("servers")
    (logs / "token").write_text(TOKEN)
    first = free_ports(4)
    serving = Serving(
        str(llama_dir),
        replicas=3,
        max_loras=4,
        port=first,
        target_modules=LEAVES,
        store_url=f"http://127.0.0.1:{first + 3}",
        store_token_file=str(logs / "token"),
        arguments=VLLM_ARGS,
    )
    started = Servers(serving, logs)
    for server, budget in zip(started.all, ("8192", "64"), strict=False):
        server.command += ["--max-num-batched-tokens", budget]
    plain = started.all[2]
    lora = plain.command.index("--enable-lora")
    plain.command = plain.command[:lora] + list(VLLM_ARGS)
    with started.running():
        yield started


@pytest.fixture
def engine(servers: Servers) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine(servers.urls[:2], patience_s=200)
    yield engine
    engine.close()


@pytest.fixture
def sync(llama_dir: Path, engine: VLLMServerEngine, shm_dir: Path) -> Iterator[NativeSync]:
    with AdapterStore(shm_dir / "run") as store:
        sync = NativeSync(tiny_lora(load_model(llama_dir), r=8), engine, store)
        yield sync
        sync.close()


def push(sync: NativeSync, seed: int) -> None:
    refill_lora(sync.model, seed=seed)  # type: ignore[arg-type]
    sync.push(seed)


def gap(sync: NativeSync, groups: list[Group]) -> float:
    """Mean |trainer - sampler| over every token of the groups, nats."""
    rows = [(group.prompt_token_ids, made) for group in groups for made in group.completions]
    own = teacher_logprobs(sync.model, [[*prompt, *made.token_ids] for prompt, made in rows])
    own = [values[len(prompt) - 1 :] for values, (prompt, _) in zip(own, rows, strict=True)]
    return mean_abs_difference(own, [list(made.logprobs) for _, made in rows])


def test_each_server_reads_its_own_base(
    llama_dir: Path, engine: VLLMServerEngine, sync: NativeSync, shm_dir: Path
) -> None:
    """In the process that computes with it; a value that differs is refused though no log-prob could tell."""
    match = sync.base_match
    assert match is not None
    assert (match.compared, match.share, match.unread) == (match.tensors, 1.0, {})
    other = load_model(llama_dir)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] *= 1.01
    with (
        AdapterStore(shm_dir / "other") as store,
        pytest.raises(UnsupportedAdapter, match=r"layers\.1\.mlp\.up_proj\.weight differs between http://127\.0\.0\.1"),
    ):
        NativeSync(tiny_lora(other, r=8), engine, store)


def test_versions_are_proven_and_sampled_from(sync: NativeSync, engine: VLLMServerEngine) -> None:
    assert sync.probe is not None
    assert sync.probe.error < 0.1 * sync.probe.signal
    for seed in (1, 2, 3):
        push(sync, seed)
        assert sync.last_receipt is not None
        assert (sync.last_receipt.load.proof, sync.last_receipt.load.verdict) == ("behaviour", "ok")
        groups = engine.generate(PROMPTS, SAMPLING, adapter=sync.head)
        assert {made.version for group in groups for made in group.completions} == {sync.head.number}
        assert gap(sync, groups) < 5 * sync.probe.noise
        assert sync.canary(groups).verdict == "ok"
    assert [version.number for version in engine.loaded()] == [2, 3]
    for number in (2, 1):  # one that is in use, and one that has to be loaded again and proven as a new one is
        sync.rollback(number)
        assert gap(sync, engine.generate(PROMPTS, SAMPLING, adapter=sync.head)) < 5 * sync.probe.noise


def test_the_same_seeds_give_the_same_tokens_from_either_replica(sync: NativeSync, servers: Servers) -> None:
    push(sync, 1)
    greedy = Sampling(max_tokens=8, temperature=0.0)
    made = []
    for url in servers.urls[:2]:
        alone = VLLMServerEngine([url])
        alone.load(sync.head)
        sampled = alone.generate(PROMPTS, SAMPLING, adapter=sync.head)
        made.append([c.token_ids for g in sampled for c in g.completions])
        made[-1] += [g.completions[0].token_ids for g in alone.generate(PROMPTS, greedy, adapter=sync.head)]
        alone.close()
    assert made[0] == made[1]
    assert len(set(made[0][:4])) == 4


def test_a_prompt_that_is_cut_over_steps_gives_the_same_tokens(servers: Servers) -> None:
    """One replica computes them whole, the other a few tokens of each step's last prompt at a time."""
    draw = torch.Generator().manual_seed(5)
    prompts = torch.randint(4, 260, (16, 40), generator=draw).tolist()
    made = []
    for url in servers.urls[:2]:
        alone = VLLMServerEngine([url])
        groups = alone.generate(prompts, Sampling(n=4, max_tokens=6, seed=3), adapter=None)
        made.append([completion.token_ids for group in groups for completion in group.completions])
        alone.close()
    assert made[0] == made[1]


def test_the_openai_client_talks_to_a_version_by_name(sync: NativeSync, engine: VLLMServerEngine) -> None:
    push(sync, 1)
    [group] = engine.generate(PROMPTS[:1], Sampling(max_tokens=8, temperature=0.0), adapter=sync.head)
    for url, name in engine.served_names(sync.head).items():
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=8, temperature=0.0)
        assert (answer.choices[0].text, answer.model) == (group.completions[0].text, name)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=f"{name}0", prompt=PROMPTS[0])


def test_a_load_that_one_server_refuses_is_on_neither(
    sync: NativeSync, engine: VLLMServerEngine, servers: Servers
) -> None:
    push(sync, 1)
    stem, _, last = max(engine.served_names(sync.head).values()).replace(".v1.", ".v2.").rpartition(".")
    client = openai.OpenAI(base_url=servers.urls[1], api_key="none")
    for name in (f"{stem}.{int(last) + ahead}" for ahead in range(1, 7)):
        client.post("/v1/load_lora_adapter", cast_to=str, body={"lora_name": name, "lora_path": str(sync.head.path)})
    with pytest.raises(EngineError, match=r"v2 failed on 1 of 2 replicas: .*already been loaded"):
        push(sync, 2)
    assert sync.head.number == 1
    assert [version.number for version in engine.loaded()] == [1]
    refill_lora(sync.model, seed=1)  # type: ignore[arg-type]
    assert sync.probe is not None
    assert gap(sync, engine.generate(PROMPTS, SAMPLING, adapter=sync.head)) < 5 * sync.probe.noise


def test_what_dead_runs_left_is_swept(sync: NativeSync, engine: VLLMServerEngine, servers: Servers) -> None:
    push(sync, 1)
    client = openai.OpenAI(base_url=f"{servers.urls[0]}/v1", api_key="none")
    dead = Names()
    left = dead.fresh(sync.head)
    dead.close()
    body = {"lora_name": left, "lora_path": str(sync.head.path)}
    client.post("/load_lora_adapter", cast_to=str, body=body)
    VLLMServerEngine(servers.urls[:2]).close()
    names = {model.id for model in client.models.list()}
    assert left not in names
    assert engine.served_names(sync.head)[servers.urls[0]] in names


def test_servers_pull_versions_from_the_store(llama_dir: Path, servers: Servers, shm_dir: Path, tmp_path: Path) -> None:
    """The probe is a version there too, never promoted, since servers can pull nothing else."""
    url = servers.all[0].environment[URL_VARIABLE]
    engine = VLLMServerEngine(servers.urls[:2], adapters="resolver")
    with AdapterStore(shm_dir / "run", tmp_path / "run") as store:
        with StoreServer(store, TOKEN, port=int(url.rpartition(":")[2])):
            sync = NativeSync(tiny_lora(load_model(llama_dir), r=8), engine, store)
            assert store.head is None
            push(sync, 1)
            assert set(engine.served_names(sync.head).values()) == {f"{store.run}@2"}
            assert sync.canary(engine.generate(PROMPTS, SAMPLING, adapter=sync.head)).verdict == "ok"
            client = openai.OpenAI(base_url=f"{servers.urls[0]}/v1", api_key="none")
            [card] = [model for model in client.models.list() if model.id == f"{store.run}@2"]
            assert not Path(card.model_extra["root"]).is_relative_to(store.root)  # type: ignore[index]
        with pytest.raises(EngineError, match=r"cannot resolve .*@3"):
            push(sync, 2)
        assert sync.head.number == 2
        sync.close()
    engine.close()


def test_a_server_without_lora_is_told_its_flag(servers: Servers) -> None:
    with pytest.raises(ConfigError, match=f"{servers.urls[2]} serves without LoRA; start it with --enable-lora"):
        VLLMServerEngine([servers.urls[2]])


def test_members_on_servers_are_their_lone_runs_after_a_kill_too(
    llama_dir: Path, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second round; afterwards the rows of each are its own version's, whichever server answers."""
    base, urls, folder = ModelConfig(name=str(llama_dir)), servers.urls[:2], tmp_path / "together"
    killed = subprocess.run(
        [sys.executable, "-m", "tests.tiny_population", base.name, str(folder), *urls],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -9, killed.stderr[-3000:]
    engine = VLLMServerEngine(urls, max_loras=4)
    with Population(base, specs(folder), engine=engine) as population:
        population.resume()
        with monkeypatch.context() as spying:
            apart = distances(spying, engine, population)
            population.train()
        assert len(apart) == 16 + 8 + 16
        assert max(own for own, _ in apart) < 1e-3 < 0.01 < min(other for _, other in apart)
        for member, spec in zip(population.members, specs(tmp_path / "alone"), strict=True):
            require_as_alone(base, engine, member.runs, spec)
    engine.close()


def test_a_trainer_on_servers_survives_the_kill_of_one(
    llama_dir: Path, engine: VLLMServerEngine, servers: Servers, tmp_path: Path
) -> None:
    """Killed while a step's completions are rewarded, started again at once, not waited for by generation."""
    killed: Server = servers.all[0]

    def reward(completions: list[str], trainer_state: object, **columns: object) -> list[float]:
        if trainer_state.global_step == 2 and killed.exit_code is None:  # type: ignore[attr-defined]
            killed.signal(signal.SIGKILL)
            killed.wait(10)
            killed.start()
        return [float(len(set(text))) for text in completions]

    config = CONFIG.replace(total_steps=4, canary_every=1)
    with tiny_trainer(llama_dir, engine, tmp_path / "run", config, reward_funcs=reward) as trainer:
        trainer.train()
        assert [metrics["canary/verdict"] for metrics in trainer.history if "canary/verdict" in metrics]
        assert trainer.version.number == 5
        assert set(engine.replicas.values()) == {"serving"}
        torch.testing.assert_close(
            torch.tensor(engine.logprobs_of_each([list(range(10, 40))], adapter=trainer.version)[0]),
            torch.tensor(engine.logprobs_of_each([list(range(10, 40))], adapter=trainer.version)[1]),
        )
