"""A rollout on servers, in the generator's thread: it can be stopped, and each answer is a sign of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines.server import engine as server_engine
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.server.launch import Servers, Serving
from lora_grpo.errors import ConfigError, EngineError
from lora_grpo.trainer.models import build_engine
from lora_grpo.types import Sampling
from lora_grpo.worker import Stopped, Worker, working
from tests.fake_vllm import FakeServer
from tests.test_server_engine import check_made_by, version
from tests.test_server_engine_real import LEAVES, VLLM_ARGS, free_ports
from tests.tiny_trainer import CONFIG, tiny_trainer

pytestmark = pytest.mark.timeout(60)

PROMPTS = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
SAMPLING = Sampling(n=4, max_tokens=3, seed=7)
LONG_S = 20.0


@pytest.fixture
def server(llama_dir: Path) -> Iterator[FakeServer]:
    with FakeServer(str(llama_dir)) as server:
        yield server


@pytest.fixture
def one_at_a_time(server: FakeServer) -> Iterator[VLLMServerEngine]:
    """An engine that asks for one completion after the other."""
    engine = VLLMServerEngine([server.url], concurrency=1)
    yield engine
    server.delay_s = 0.0
    engine.close()


@pytest.fixture
def loaded(one_at_a_time: VLLMServerEngine, shm_dir: Path) -> AdapterVersion:
    first = version(shm_dir, 1)
    one_at_a_time.load(first)
    return first


def test_a_rollout_on_servers_is_stopped_at_once(
    server: FakeServer, one_at_a_time: VLLMServerEngine, loaded: AdapterVersion
) -> None:
    generator = Worker("generator", patience_s=1800.0)
    server.delay_s = LONG_S
    job = generator.submit(lambda: one_at_a_time.generate(PROMPTS, SAMPLING, adapter=loaded))
    while not server.in_flight:
        time.sleep(0.01)
    started = time.monotonic()
    job.stop()
    with pytest.raises(Stopped, match="the generator was told to stop"):
        generator.wait(job)
    generator.end()
    assert generator.join()
    assert time.monotonic() - started < LONG_S / 4
    server.delay_s = 0.0
    check_made_by(one_at_a_time.generate(PROMPTS, SAMPLING, adapter=loaded), loaded)


def test_each_answer_is_a_sign_of_life(
    server: FakeServer, one_at_a_time: VLLMServerEngine, loaded: AdapterVersion
) -> None:
    """A healthy rollout may take longer than the watchdog's patience, an answer may not."""
    generator = Worker("generator", patience_s=1.0)
    server.delay_s = 0.25
    started = time.monotonic()
    made = generator.wait(generator.submit(lambda: one_at_a_time.generate(PROMPTS, SAMPLING, adapter=loaded)))
    assert time.monotonic() - started > 2.0
    check_made_by(made, loaded)
    server.delay_s = LONG_S
    job = generator.submit(lambda: one_at_a_time.generate(PROMPTS, SAMPLING, adapter=loaded))
    with pytest.raises(EngineError, match="the generator has shown no progress for 1 s"):
        generator.wait(job)
    job.stop()
    generator.end()


def test_only_a_workers_own_thread_is_its() -> None:
    generator = Worker("generator", patience_s=10.0)
    assert generator.wait(generator.submit(working.get)) is generator
    assert working.get() is None
    seen: list[Worker | None] = []
    other = threading.Thread(target=lambda: seen.append(working.get()))
    other.start()
    other.join()
    assert seen == [None]
    generator.end()


def test_the_settings_reach_the_servers_engine(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(server_engine, "VLLMServerEngine", lambda urls, **named: given.append(named))
    plain = EngineConfig(urls=("http://127.0.0.1:9",))
    build_engine(ModelConfig(name=str(llama_dir)), plain)
    build_engine(ModelConfig(name=str(llama_dir)), plain.replace(concurrency=3, timeout_s=7200.0, patience_s=20.0))
    limits = [(named["concurrency"], named["timeout_s"], named["patience_s"]) for named in given]
    assert limits == [(256, 600.0, 300.0), (3, 7200.0, 20.0)]
    with pytest.raises(ConfigError, match=r"timeout_s: .*above 0"):
        EngineConfig(timeout_s=0)


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_a_trainer_samples_ahead_on_a_server(llama_dir: Path, tmp_path: Path) -> None:
    """Versions are loaded and proven while rollouts go on, and each rollout ends on the one that it began with."""
    config = CONFIG.replace(total_steps=5, max_staleness=1, canary_every=1, learning_rate=6e-3)
    serving = Serving(str(llama_dir), port=free_ports(1), target_modules=LEAVES, arguments=VLLM_ARGS)
    with Servers(serving, tmp_path).running() as servers:
        there = EngineConfig(urls=tuple(servers.urls))
        with tiny_trainer(llama_dir, None, tmp_path / "run", config, engine_config=there) as trainer:
            assert trainer.train()["steps"] == 5
            lags = [metrics["step"] - metrics["version"] for metrics in trainer.history]
            assert lags == [metrics["sample/staleness_max"] for metrics in trainer.history]
            assert max(lags) == 1
            assert trainer.history[-1]["sample/dropped_stale_total"] == 0
            verdicts = [metrics["canary/verdict"] for metrics in trainer.history]
            assert "failed" not in verdicts
            assert "ok" in verdicts
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lora_grpo-")]
