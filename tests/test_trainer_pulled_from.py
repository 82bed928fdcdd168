"""A trainer whose server shares no disk with it: the version travels over HTTP, by name, and is proven."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from lora_grpo.config import EngineConfig
from lora_grpo.engines.server.launch import Servers, Serving
from lora_grpo.errors import ConfigError, StoreError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.remote.client import TOKEN_FILE_VARIABLE
from lora_grpo.types import Sampling
from tests.test_server_engine_real import LEAVES, VLLM_ARGS, free_ports
from tests.tiny_models import load_model
from tests.tiny_trainer import CONFIG, tiny_trainer


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_a_server_pulls_each_version_from_the_trainer(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, port = tmp_path / "token", free_ports(2)
    token.write_text(secrets.token_hex(16))
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(token))
    address = f"127.0.0.1:{port + 1}"
    serving = Serving(
        str(llama_dir),
        port=port,
        target_modules=LEAVES,
        store_url=f"http://{address}",
        store_token_file=str(token),
        arguments=VLLM_ARGS,
    )
    with Servers(serving, tmp_path).running() as servers:
        there = EngineConfig(urls=tuple(servers.urls), store_address=address)
        config = CONFIG.replace(total_steps=3, canary_every=1, learning_rate=2e-2)
        with tiny_trainer(llama_dir, None, tmp_path / "run", config, engine_config=there) as trainer:
            trainer.train()
            names = trainer.engine.served_names(trainer.version)
            assert list(names.values()) == [f"{trainer.store.run}@{trainer.version.number}"]
            assert trainer.history[-1]["canary/verdict"] == "ok"
            [group] = trainer.engine.generate(["abc "], Sampling(n=4, max_tokens=8, seed=1), adapter=trainer.version)
            assert {completion.version for completion in group.completions} == {trainer.version.number}
            rows = [[*group.prompt_token_ids, *completion.token_ids] for completion in group.completions]
            served = trainer.engine.logprobs(rows, adapter=trainer.version)
            own, of_the_base = (teacher_logprobs(model, rows) for model in (trainer.model, load_model(llama_dir)))
            assert mean_abs_difference(served, own) < mean_abs_difference(served, of_the_base) / 5
            root = trainer.store.root
            assert root.is_dir()
        assert not root.exists()


def test_an_address_that_cannot_be_listened_on_ends_the_start(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(tmp_path / "token"))
    (tmp_path / "token").write_text("a" * 32)
    there = EngineConfig(urls=("http://127.0.0.1:9",), store_address="192.0.2.1:8731")
    with pytest.raises(StoreError, match=r"192\.0\.2\.1"):
        tiny_trainer(llama_dir, None, tmp_path / "run", engine_config=there)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store_address": "10.0.0.5"}, "must be host:port"),
        ({"store_address": "10.0.0.5:99999"}, "must be host:port"),
        ({"store_address": "10.0.0.5:8731", "urls": ()}, "there are none"),
        ({"urls": ("10.0.0.11:8000",)}, "urls: '10.0.0.11:8000' is no server's address; write one such as"),
        ({"urls": ("ftp://10.0.0.11",)}, "is no server's address"),
        ({"urls": ("http://a:1", "http://a:1/v1")}, "must name each server once"),
    ],
)
def test_addresses_are_checked(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**{"urls": ("http://10.0.0.11:8000",), **settings})
