"""Shared real engines: starting one takes seconds, so tests that can share one do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell has what it starts in the background ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A time limit ends a suite with SIGTERM: as after Ctrl-C, pytest then writes down what has finished.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the parity suite puts trainer and engine: cpu, or cuda:0 as on a GPU host",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first: two processes then end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_trl_example.py")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


ENGINE_ARGS = {"max_model_len": 128, "enforce_eager": True, "gpu_memory_utilization": 0.1, "max_num_seqs": 64}


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import tiny_model

    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_engine(llama_dir: Path) -> Iterator[object]:
    """One real engine on a tiny Llama: two slots, four loaded versions, rank 16."""
    from lora_grpo.engines.vllm_local import VLLMEngine

    engine = VLLMEngine(llama_dir, max_lora_rank=16, **ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A fresh directory on tmpfs."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-test-") as folder:
        yield Path(folder)


def read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads its variables anew in this test; an engine that was started in this process had it remember them."""
    from vllm import envs

    remembering: Any = vars(envs)["__getattr__"]
    monkeypatch.setattr(envs, "__getattr__", getattr(remembering, "__wrapped__", remembering))
