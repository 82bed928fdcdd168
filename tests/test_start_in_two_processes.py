"""How a trainer of two processes starts: what fails in one ends both, and servers are the first one's alone."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_grpo.config import EngineConfig
from lora_grpo.engines.server.launch import Servers, Serving
from lora_grpo.errors import ConfigError, EngineError, StoreError
from lora_grpo.grpo.processes import Processes
from lora_grpo.metrics.log import read_metrics
from lora_grpo.trainer import assembly, preflight, room
from lora_grpo.trainer.loop import canary
from tests.test_server_engine_real import LEAVES, VLLM_ARGS, free_ports
from tests.test_trainer_processes import PerProcess, assert_near, config, run
from tests.tiny_models import tiny_model
from tests.tiny_trainer import CONFIG, tiny_trainer
from tests.two_processes import TIMEOUT_S, in_two

ELSEWHERE = "192.0.2.1:8731"
"""An address that no process here can listen on."""

ENDS = {
    "engine": (EngineError, "process 1: no memory here"),
    "checks": (ConfigError, "process 1: it does not fit"),
    "model": (ConfigError, "process 1: no such checkpoint"),
    "store_server": (StoreError, "192.0.2.1"),
    "vocabulary": (ConfigError, "process 0: other tokens"),
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-test-") as name:
        tiny_model("llama", Path(name) / "base")
        yield Path(name)


def starts(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Trainers that fail to start, each in one of the processes."""
    engine = PerProcess(folder / "base")
    closed: list[int] = []
    engine.close = lambda: closed.append(1)  # type: ignore[method-assign]
    first = accelerator.process_index == 0
    found: dict[str, Any] = {}

    def attempt(name: str, replaced: str, raised: Exception | None, module: Any = assembly, **settings: Any) -> None:
        """With a part of `module` that raises in this process, or a sound engine."""
        module = room if replaced == "build_engine" else module
        kept = {part: getattr(part_of, part) for part_of, part in ((module, replaced), (room, "build_engine"))}
        room.build_engine = lambda *_, **__: engine  # type: ignore[assignment]
        if raised is not None:
            setattr(module, replaced, lambda *_, **__: _raise(raised))
        started = time.monotonic()
        try:
            tiny_trainer(folder / "base", None, folder / name, config(2), **settings).close()
        except Exception as error:  # noqa: BLE001 - what it is, is the question
            found[name] = type(error), str(error), time.monotonic() - started
        for part, function in kept.items():
            setattr(room if part == "build_engine" else module, part, function)

    attempt("engine", "build_engine", None if first else EngineError("no memory here"))
    found["closed"] = list(closed)
    attempt("checks", "plan_room", None if first else ConfigError("it does not fit"))
    attempt("model", "build_policy_model", None if first else ConfigError("no such checkpoint"))
    there = EngineConfig(urls=("http://127.0.0.1:9",), store_address=ELSEWHERE)
    os.environ["LORA_GRPO_STORE_TOKEN"] = "a" * 32
    attempt("store_server", "build_engine", None, engine_config=there)
    spoiled = ConfigError("other tokens") if first else None
    attempt("vocabulary", "check_same_vocabulary", spoiled, preflight, processing_class=engine.tokenizer)
    return found


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture(scope="module")
def ends(folder: Path) -> list[dict[str, Any]]:
    return [results["starts"] for results in in_two({"starts": starts}, folder)]


@pytest.mark.parametrize("name", ENDS)
def test_a_start_that_fails_in_one_process_fails_in_both(ends: list[dict[str, Any]], name: str) -> None:
    kind, words = ENDS[name]
    for found in ends:
        raised, said, seconds = found[name]
        assert raised is kind, said
        assert words in said
        assert seconds < TIMEOUT_S / 2


def test_the_engine_that_did_start_is_closed(ends: list[dict[str, Any]]) -> None:
    assert [found["closed"] for found in ends] == [[1], []]


def _late(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    # Two seconds are short for one to wait for what the other has to import.
    (Path(folder) / f"here_{rank}").touch()
    while len(list(Path(folder).glob("here_*"))) < 2:
        time.sleep(0.01)
    accelerator = assembly.launched(2.0)
    assert assembly.launched() is accelerator
    processes = Processes(accelerator)
    processes.gather(rank)
    started = time.monotonic()
    if rank:
        time.sleep(8)
    else:
        with pytest.raises(RuntimeError):
            processes.gather(rank)
        (Path(folder) / "waited_s").write_text(str(time.monotonic() - started))
    os._exit(0)


def test_how_long_processes_wait_for_each_other_is_a_setting(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_late, args=(port, str(tmp_path)), nprocs=2)
    assert 1.5 < float((tmp_path / "waited_s").read_text()) < 7
    assert timedelta(seconds=CONFIG.ddp_timeout) == timedelta(minutes=30)


@pytest.mark.parametrize(("noise", "first_says"), [(0.0, False), (1.0, True)])
def test_whether_a_canary_is_due_is_the_first_processs_say(noise: float, first_says: bool) -> None:
    """Each knows the noise to its own rounding, and a canary in some of them only would hang."""
    asked: list[bool] = []

    def share(value: bool) -> bool:
        asked.append(value)
        return first_says

    sync = SimpleNamespace(head=SimpleNamespace(number=3), noise=noise, probe="kept", canary=lambda *_, **__: "done")
    parts: Any = SimpleNamespace(sync=sync, policy=SimpleNamespace(processes=SimpleNamespace(share=share)))
    group: Any = SimpleNamespace(completions=[SimpleNamespace(version=3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_grpo.trainer.loop.spread", lambda groups, rows: groups)
        assert canary(parts, CONFIG, [group], 0.1, step=2) == ("done" if first_says else None)
    assert asked == [not first_says]


def on_servers(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Two steps on the servers that the first process alone may talk to."""
    from lora_grpo.engines.server import engine

    if accelerator.process_index:
        engine.VLLMServerEngine = None  # type: ignore[assignment,misc]
    receipts: list[Any] = []
    return run(folder / "base", None, folder / "both", real(2), receipts=receipts, **there(folder)) | {
        "receipts": receipts
    }


def there(folder: Path) -> dict[str, EngineConfig]:
    return {"engine_config": EngineConfig(urls=((folder / "url").read_text(),))}


def real(processes: int) -> Any:
    return config(processes, total_steps=2, vllm_importance_sampling_correction=True, canary_every=1)


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_two_processes_train_on_servers_as_one_does(folder: Path, tmp_path: Path) -> None:
    serving = Serving(str(folder / "base"), port=free_ports(1), target_modules=LEAVES, arguments=VLLM_ARGS)
    with Servers(serving, tmp_path).running() as servers:
        (folder / "url").write_text(servers.urls[0])
        both = [results["on_servers"] for results in in_two({"on_servers": on_servers}, folder)]
        alone = run(folder / "base", None, folder / "alone", real(1), **there(folder))
    for found in both:
        assert [receipt.load.proof for receipt in found["receipts"]] == ["behaviour"] * 3
        assert_near(found["weights"], alone["weights"])
        assert found["head"].number == 3
    # Later ones come from weights that other micro-batches rounded otherwise, by which a draw may change.
    assert both[0]["noted"][:2] == alone["noted"][:2]
    steps = [record for record in read_metrics(folder / "both" / "run") if record["event"] == "step"]
    assert "failed" not in {record["canary/verdict"] for record in steps}
