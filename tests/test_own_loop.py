"""Loops of other makers answer the command line: on a store of their own, and in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_grpo.adapters.asking.requests import pending, request
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import read_metrics
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.run import answer_requests
from tests.tiny_models import load_model, refill_lora, tiny_lora
from tests.tiny_run import fake_engine
from tests.two_processes import in_two


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_loop_of_ones_own_answers_before_its_next_step(
    llama_dir: Path, shm_dir: Path, tmp_path: Path, capfd: Any
) -> None:
    model, run = tiny_lora(load_model(llama_dir), r=8), tmp_path / "run"
    with AdapterStore(shm_dir / "root", run) as store:
        sync = NativeSync(model, fake_engine(llama_dir), store)
        answer_requests(sync)
        assert not (run / "metrics.jsonl").exists(), "nothing was asked, so nothing is said"
        sync.push(step=0)
        first = trained(model)
        refill_lora(model, seed=1)
        sync.push(step=1)
        asked = [request(run, "rollback", to=9), request(run, "rollback", to="parent"), request(run, "pin", version=2)]
        answer_requests(sync)
        unknown, back, pinned = (each.answered() for each in asked)
        assert unknown is not None
        assert unknown["kind"] == "UnknownVersion"
        assert back is not None
        assert (back["version"], back["left"], back["weights"]) == (1, 2, "exact")
        assert pinned is not None
        assert pinned["pins"] == [2]
        assert sync.head.number == 1
        assert all(torch.equal(first[name], value) for name, value in trained(model).items())
        assert pending(store.archive) == []
        assert sync.push(step=1).parent == 1
        sync.close()
    told = [(record["event"], record["text"]) for record in read_metrics(run)]
    assert [event for event, _ in told] == ["message", "message", "rollback", "message"]
    assert "NativeSync knows no optimizer, so its moments are those of v2 still" in told[1][1]
    assert told[2][1].startswith("asked from outside: rollback parent: rolled back from v2 to v1")
    assert all(text in capfd.readouterr().err for _, text in told[2:3])
    assert not (run / "samples.jsonl").exists()


def test_two_loops_do_not_publish_to_one_store(llama_dir: Path, shm_dir: Path) -> None:
    """One's version would be the parent of the other's, and the best of the one be what the other goes back to."""
    models = [tiny_lora(load_model(llama_dir), r=8, seed=seed) for seed in (0, 1)]
    with AdapterStore(shm_dir) as store:
        first, second = (NativeSync(model, fake_engine(llama_dir), store) for model in models)
        first.push(step=0)
        with pytest.raises(ConfigError, match=r"HEAD in .* is v1, but .* left it at nowhere: .* a store of its own"):
            second.push(step=0)
        assert [version.number for version in store.list()] == [1]
        assert first.push(step=1).parent == 1


UNCLOSED = """
from lora_grpo.adapters.store import AdapterStore
store, files = AdapterStore(), {"adapter_model.safetensors": [b"x"], "adapter_config.json": [b"{}"]}
for step in range(3):
    store.acquire(store.publish(files, step=step))
store.close()
print(store.root, len([*store.root.joinpath("versions").iterdir()]))
"""


def test_what_an_engine_may_still_read_goes_with_the_process() -> None:
    """A loop that an exception ended closes its store, but not its sync."""
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, check=True)
    root, count = done.stdout.split()
    assert (count, Path(root).exists()) == ("3", False)
    assert "is closed, and its 3 versions removed for good: archive=DIR keeps versions on disk" in done.stderr


def _asked_in_two(accelerator: Any, folder: Path) -> Any:
    leads, base, run = accelerator.process_index == 0, folder / "base", folder / "run"
    model, engine = tiny_lora(load_model(base), r=8), fake_engine(base)
    store = AdapterStore(folder / "root", run) if leads else None
    sync = NativeSync(model, engine, store, accelerator=accelerator)
    sync.push(step=0)
    first = trained(model)
    refill_lora(model, seed=1)
    sync.push(step=1)
    asked = [request(run, "rollback", to=to) for to in (9, 1)] if leads else []
    answer_requests(sync)
    answers = [each.answered() for each in asked]
    back = all(torch.equal(first[name], value) for name, value in trained(model).items())
    sync.close()
    if store is not None:
        store.close()
    return sync.head.number if leads else None, back, [answer and answer.get("version") for answer in answers]


def test_all_processes_of_a_loop_go_back_together(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(llama_dir)
    first, second = in_two({"asked": _asked_in_two}, tmp_path)
    assert first["asked"] == (1, True, [None, 1])
    assert second["asked"] == (None, True, [])
