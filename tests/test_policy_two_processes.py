"""Two real processes (gloo, on the CPU) make the update that one makes on all rows."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_grpo.errors import ConfigError, TrainingError
from lora_grpo.grpo.batch import Batch
from lora_grpo.policy import Policy
from tests.tiny_policy import adapter_weights, assert_same, config, drifted, gradient, peft_model, rollout

CASES = [
    *({"loss_type": loss_type} for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")),
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "bnpo", "beta": 0.1, "mask_truncated_completions": True},
]
ADVANTAGES = torch.tensor([1.0, -0.5, 0.4, 0.7, 0.0, 0.0, 0.0, 0.0, -1.2, 0.8, 0.3, 0.9, 0.0, 0.0, 0.0, 0.0])
"""The second process's rows, 4 to 7 and 12 to 15, move nothing without a KL: it computes no forward at all."""

ROWS = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def whole_batch(case: dict[str, Any]) -> Batch:
    """Prepared by a policy of this process, with drift that depends on no process."""
    groups = rollout(prompt_lengths=(3, 5, 2, 9), truncated=3)
    masked = bool(case.get("mask_truncated_completions"))
    batch = Batch.from_groups(groups, ADVANTAGES, mask_truncated=masked)
    policy = Policy(peft_model(), config(4))
    return drifted(policy.prepare(batch), policy.logprobs(batch))


def run_cases(rank: int, port: int, folder: str) -> None:
    """What each process does; its adapter is seeded with its rank, so that only the first one's can be right."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    results: list[Any] = []
    for case in CASES:
        batch = whole_batch(case).select(torch.tensor(ROWS[rank]))
        policy = Policy(peft_model_of(rank), config(4, gradient_accumulation_steps=2, **case), accelerator=accelerator)
        start = adapter_weights(policy.model)
        results.append((start, *gradient(policy, batch)))
    results.append(trained(accelerator, rank))
    results.append(refusals(accelerator, rank))
    torch.save(results, Path(folder) / f"{rank}.pt")
    accelerator.end_training()


def peft_model_of(rank: int) -> Any:
    """One base everywhere, another adapter in each process."""
    model = peft_model()
    if rank:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    return model


def trained(accelerator: Any, rank: int) -> dict[str, Tensor]:
    """Weights after two AdamW updates under DDP, which accelerate wraps a model in."""
    model = accelerator.prepare(peft_model_of(rank))
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    settings = config(4, gradient_accumulation_steps=2, learning_rate=1e-2, beta=0.1)
    policy = Policy(model, settings, accelerator=accelerator)
    batch = whole_batch({}).select(torch.tensor(ROWS[rank]))
    for _ in range(2):
        policy.update(batch)
    return adapter_weights(policy.model)


def refusals(accelerator: Any, rank: int) -> list[str]:
    """What one process alone got wrong has to stop both, or the other waits for ever."""
    said: list[str] = []
    policy = Policy(peft_model(), config(4), accelerator=accelerator)
    batch = whole_batch({}).select(torch.arange(4))
    unequal = whole_batch({}).select(torch.arange(4 * (rank + 1)))
    broken = replace(batch, advantages_B=batch.advantages_B / (1.0 - rank))
    for wrong in (unequal, broken):
        try:
            policy.update(wrong)
        except (ConfigError, TrainingError) as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The results of the two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_cases, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number].values())))
def test_gradient_and_metrics_are_those_of_one_process(both: list[Any], number: int) -> None:
    """Guards global normalisers, the sum over processes (a mean would halve it), and one start for all adapters."""
    policy = Policy(peft_model(), config(16, **CASES[number]))
    expected, metrics = gradient(policy, whole_batch(CASES[number]))
    for start, got, got_metrics in (results[number] for results in both):
        assert_same(adapter_weights(policy.model), start, rtol=0)
        assert_same(expected, got)
        assert got_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_trained_weights_are_those_of_one_process(both: list[Any]) -> None:
    policy = Policy(peft_model(), config(16, learning_rate=1e-2, beta=0.1))
    before = adapter_weights(policy.model)
    for _ in range(2):
        policy.update(whole_batch({}))
    after = adapter_weights(policy.model)
    assert max((after[name] - before[name]).abs().max() for name in after) > 1e-2
    for results in both:
        for name, weight in results[len(CASES)].items():
            torch.testing.assert_close(weight, after[name], rtol=1e-3, atol=1e-4)


def test_an_error_in_one_process_stops_both(both: list[Any]) -> None:
    for said, message in product(both, (0, 1)):
        expected = ("have between 4 and 8 rows", "the step was not taken")[message]
        assert expected in said[-1][message]
