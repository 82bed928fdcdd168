"""What many syncs leave of the trainer's frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_grpo.bench.plan import Cell, Subject, results_of
from lora_grpo.bench.prepared import Bench, sequences
from lora_grpo.bench.schema import DriftRow
from lora_grpo.bench.settings import Settings

LEARNING_RATE = 1e-4


def cell(settings: Settings, subject: Subject) -> Cell:
    """Of one strategy, which may live on from other measurements."""
    return Cell(
        f"fidelity/drift/{subject.strategy}",
        "drift",
        "drift:measure",
        (subject,),
        {"cycles": sorted(settings.cycles)},
        labels={"shape": settings.label},
    )


def measure(bench: Bench, cycles: list[int]) -> list[dict[str, Any]]:
    """Worker: an adapter as after 100 steps at a learning rate of 1e-4, then a step and a sync a cycle."""
    from lora_grpo.bench.reference import Reference

    trainer = bench.strategy.trainer
    reference = Reference(bench.subject.model, bench.subject.device)
    reference.restore_base(trainer)
    trainer.reset(LEARNING_RATE * 10)
    found, done = [], 0
    for cycle in cycles:
        for _ in range(cycle - done):
            trainer.step(LEARNING_RATE)
            bench.strategy.sync()
        done = cycle
        found.append({"cycles": cycle, **_drift(bench, reference)})
    return found


def _drift(bench: Bench, reference: Any) -> dict[str, float]:
    from lora_grpo.scoring import mean_abs_difference

    trainer, tokens = bench.strategy.trainer, sequences(bench.subject)
    modules = {module.path: module for module in trainer.modules}
    apart = size = largest = 0.0
    for path, module in modules.items():
        base_OI = reference.weight(path)
        difference_OI = (trainer.base_weight(module).float() - base_OI).abs()
        apart += float(difference_OI.sum())
        size += float(base_OI.abs().sum())
        largest = max(largest, float(difference_OI.max()))
    base = reference.logprobs(tokens)
    with reference.weights(modules, lambda path, _: trainer.base_weight(modules[path])):
        shift = mean_abs_difference(reference.logprobs(tokens), base)
    return {"mean_relative": apart / size, "max_abs": largest, "logprob_shift_nats": shift}


def rows(cell: Mapping[str, Any], bandwidth: object) -> list[DriftRow]:
    strategy = cell["order"][0]
    return [DriftRow(strategy=strategy, **cell["labels"], **found) for found in results_of(cell, strategy)[0]]
