"""A hub name without a network: said at once, or taken from the cache at once; a slow network is still one."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, utils

from lora_grpo import hub
from lora_grpo.config import DataConfig, ModelConfig
from lora_grpo.data import load_data
from lora_grpo.engines.local.targets import check_is_base, check_served, checkpoint_config
from lora_grpo.errors import ConfigError
from lora_grpo.trainer.checking import random_base
from lora_grpo.trainer.preflight import checkpoint_tokenizer

CLOSED = "http://127.0.0.1:1"
NAME = "Qwen/Qwen3-0.6B"


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As on a machine where nobody has set HF_HUB_OFFLINE; the cache is empty, and a library that waits fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": CLOSED, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub, "_asked_at", -math.inf)
    monkeypatch.setattr(hub, "_answer", "")
    waits = SimpleNamespace(**{**vars(time), "sleep": lambda s: pytest.fail(f"a library waits {s} s to try again")})
    monkeypatch.setattr(utils._http, "time", waits)
    yield tmp_path / "hub"
    utils.close_session()


LOOKS: dict[str, Callable[[], Any]] = {
    "config": lambda: checkpoint_config(NAME),
    "a revision's config": lambda: checkpoint_config(NAME, revision="v2"),
    "adapter": lambda: check_is_base(NAME),
    "vLLM": lambda: check_served(NAME),
    "tokenizer": lambda: checkpoint_tokenizer(ModelConfig(name=NAME)),
    "random weights": lambda: random_base(NAME).__enter__(),
    "data": lambda: load_data(DataConfig(train=NAME)),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_name_that_cannot_be_had_is_told_without_trying_again(look: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=rf"'{NAME}'.* {CLOSED} cannot be reached \(.+\)") as raised:
        look()
    assert "\n" not in str(raised.value)


def test_where_the_user_forbade_to_ask_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=rf"'{NAME}' .*and HF_HUB_OFFLINE forbids to ask the hub: name its directory"):
        checkpoint_config(NAME)
    assert constants.HF_HUB_OFFLINE


def test_a_cached_model_is_taken_as_it_is(no_network: Path, llama_dir: Path) -> None:
    """Files that it lacks, such as an adapter's config, are not asked for again and again either."""
    snapshot = no_network / "models--tiny--llama" / "snapshots" / ("c" * 40)
    shutil.copytree(llama_dir, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    check_is_base("tiny/llama")
    assert checkpoint_config("tiny/llama").model_type == "llama"
    assert checkpoint_tokenizer(ModelConfig(name="tiny/llama")).encode("fox")
    with pytest.raises(ConfigError, match="'tiny/llama' is not a directory here"):
        checkpoint_config("tiny/llama", revision="another")


class Slow(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        threading.Event().wait(0.2)
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("patience_s", [0.05, 10], ids=["too late", "with an error"])
def test_a_hub_that_answers_is_there_and_comes_back(monkeypatch: pytest.MonkeyPatch, patience_s: float) -> None:
    assert hub.out_of_reach()
    assert constants.HF_HUB_OFFLINE
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience_s)
        assert hub.out_of_reach(), "not asked again within the minute"
        monkeypatch.setattr(hub, "_asked_at", -math.inf)
        assert not hub.out_of_reach()
        assert not constants.HF_HUB_OFFLINE
        server.shutdown()
