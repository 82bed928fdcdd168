"""Seconds until the engine can sample from the new policy, by phase; bytes moved; times the physical floor; and what
proving costs besides each push.

A push's own proofs (digest, slots) are phases of it. Besides, the same base and the probe are proven once an engine,
and a canary is taken when it is asked for.
"""

from __future__ import annotations

import gc
import timeit
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.adapters.files.disk import STAGING
from lora_grpo.bench import fidelity
from lora_grpo.bench.gauges import floor_seconds, percentile_95
from lora_grpo.bench.plan import Cell, Settings, Subject, beside_native, results
from lora_grpo.bench.schema import SyncRow
from lora_grpo.bench.strategies import NATIVE
from lora_grpo.grpo.processes import Processes
from lora_grpo.types import Sampling

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy
    from lora_grpo.bench.strategies.native import Native

WARM = 3
"""Syncs thrown away: caches, allocators and lazily built state of every strategy settle."""
PROVEN = 3
"""Times that each proof is measured."""


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """Each strategy beside `native`, with its truth; what proofs cost besides; the sweeps of ranks and targets."""
    planned = [_pair(settings, subject, strategy) for strategy in settings.others]
    if settings.truth:
        # In the same process, while it is alive: what was timed serves what it claims to.
        planned += [fidelity.truth_cell("sync", subject.with_strategy(strategy)) for strategy in settings.strategies]
    if settings.canary_rows:
        warm = {"settings": settings.replace(canary_rows=()), "times": 1}
        native = (subject.with_strategy(NATIVE),)
        planned.append(Cell("sync/proofs", "proof", prove, native, {"settings": settings}, warm=warm))
    swept = [strategy for strategy in settings.sweep_strategies if strategy in settings.strategies]
    elsewhere = [replace(subject, rank=rank) for rank in settings.sweep_ranks]
    elsewhere += [replace(subject, targets=targets) for targets in settings.sweep_targets]
    return planned + [_pair(settings, one, strategy) for one in elsewhere if one != subject for strategy in swept]


def _pair(settings: Settings, subject: Subject, strategy: str) -> Cell:
    labels, syncs = {"rank": subject.rank, "targets": subject.targets}, {"syncs": settings.each_way}
    return beside_native("sync", measure, subject, strategy, arguments=syncs, warm={"syncs": WARM}, labels=labels)


def measure(strategy: Strategy, syncs: int, *, at_once: bool = False) -> dict[str, Any]:
    """Worker: syncs, each after a step that is not timed; `at_once` has a merge hand its weights over in one call."""
    strategy.at_once = at_once
    done = [strategy.renew() for _ in range(syncs)]
    strategy.at_once = False
    return {
        "phases_s": {phase: [synced.seconds[phase] for synced in done] for phase in done[-1].seconds},
        "afterwards_s": [synced.afterwards_s for synced in done],
        "moved_bytes": done[-1].moved_bytes,
        "loader": strategy.loader,
        "load_calls": strategy.load_calls,
    }


def rows(cell: Mapping[str, Any]) -> list[SyncRow]:
    found, made = results(cell), list[SyncRow]()
    against = ["unpaired"] * len(found) if cell.get("unpaired") else reversed(found)
    for (strategy, of), other in zip(found.items(), against, strict=True):
        seconds = [sum(phases) for phases in zip(*of["phases_s"].values(), strict=True)]
        floor_s = floor_seconds(of["moved_bytes"], cell["bandwidth"])
        row = SyncRow(
            strategy=strategy,
            **cell["labels"],
            against=other,
            median_s=median(seconds),
            p95_s=percentile_95(seconds),
            phases_s={phase: median(each) for phase, each in of["phases_s"].items()},
            afterwards_s=median(of["afterwards_s"]),
            moved_bytes=max(of["moved_bytes"].values(), default=0),
            floor_s=floor_s,
            times_floor=median(seconds) / floor_s if floor_s else None,
            ratio_to_native=median(seconds) / (made[0].median_s if made else median(seconds)),
            syncs=len(seconds),
            loader=of["loader"],
            load_calls=of["load_calls"],
        )
        made.append(row)
    return made


def prove(strategy: Native, settings: Settings, times: int = PROVEN) -> list[dict[str, Any]]:
    """Worker: seconds of each proof, several times, and of as many pushes."""
    strategy.trainer.step()
    push_s = median([strategy.sync().total_s for _ in range(4 * times)])
    found = []
    for proof, rows, work in _proofs_of(strategy, settings):
        median_s = median(timeit.repeat(work, gc.enable, number=1, repeat=times))
        row = {"proof": proof, "rows": rows, "tokens": rows and settings.prompt_tokens, "times": times}
        found.append({**row, "median_s": median_s, "ratio_to_push": median_s / push_s})
    return found


def _proofs_of(strategy: Native, settings: Settings) -> Iterator[tuple[str, int | None, Callable[[], object]]]:
    """Each with the completions that it looks at, which are as long as their prompts; making them is no part of it."""
    from lora_grpo.adapters.peft_form.serving import ServingForm
    from lora_grpo.bench.strategies.base import ADAPTER
    from lora_grpo.engines.delivery.base_match import match_base
    from lora_grpo.engines.delivery.probe import run_probe

    engine, model = strategy.engine, strategy.trainer.model
    dtype, staging = getattr(torch, engine.lora_dtype), strategy.store.root / STAGING
    yield "same base", None, lambda: match_base(engine, model, Processes(None))
    yield "probe", None, lambda: run_probe(model, ServingForm(model, ADAPTER, dtype), engine, staging)
    tokens = settings.prompt_tokens
    sampling = Sampling(n=1, max_tokens=tokens, temperature=1.0, seed=strategy.subject.seed, ignore_eos=True)
    for rows in settings.canary_rows:
        groups = strategy.generate(strategy.subject.fresh_prompts(rows, tokens), sampling)
        yield "canary", rows, partial(strategy.pusher.canary, groups)
