"""Syncs: seconds by phase until the engine can sample from the new policy, and until an earlier version serves and
trains again; whether many leave time and memory where they were; and what is proven besides each push."""

import gc
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from lora_grpo.adapters.files.disk import STAGING
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.bench.fidelity import truth
from lora_grpo.bench.gauges import cuda_level, floor_seconds, on_tmpfs, percentile_95, resident
from lora_grpo.bench.plan import NATIVE, Cell, Settings, Subject, alone, beside_native, results
from lora_grpo.bench.schema import RollbackRow, SyncRow
from lora_grpo.bench.strategies import Native
from lora_grpo.bench.strategy import ADAPTER, Strategy
from lora_grpo.engines.delivery.agreement import match_base
from lora_grpo.engines.delivery.probe import run_probe
from lora_grpo.grpo.forward import mean_abs_difference
from lora_grpo.grpo.processes import Processes
from lora_grpo.types import Sampling

WARM = 3  # syncs thrown away: caches, allocators and lazily built state of every strategy settle
ENDURANCE_WARM = 20  # syncs thrown away: enough to fill every place that retention then keeps full
TENTHS, SAMPLES = 10, 10  # the latter: looks at the memory in each tenth; each takes as long as a sync
_SIZES = ("memory_bytes", "cuda_bytes", "tmpfs_bytes")


def sync_cells(settings: Settings, subject: Subject) -> list[Cell]:
    planned = [_pair(settings, subject, strategy) for strategy in settings.others]
    if settings.truth:
        # In the same process, while it is alive: what was timed serves what it claims to.
        planned += [alone("sync/truth", "truth", truth, subject, strategy) for strategy in settings.strategies]
    if settings.canary_rows:
        warm, asked = {"settings": settings.replace(canary_rows=()), "times": 1}, {"settings": settings}
        planned.append(alone("sync/proofs", "proof", prove, subject, NATIVE, arguments=asked, warm=warm))
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


def sync_rows(cell: Mapping[str, Any]) -> list[SyncRow]:
    found, made = results(cell), list[SyncRow]()
    against = ["unpaired"] * len(found) if cell.get("unpaired") else reversed(found)
    for (strategy, of), other in zip(found.items(), against, strict=True):
        seconds = [sum(phases) for phases in zip(*of["phases_s"].values(), strict=True)]
        floor_s = floor_seconds(of["moved_bytes"], cell["bandwidth"])
        row = SyncRow(
            strategy=strategy,
            **cell["labels"],
            against=other,
            **_summary(seconds, made),
            phases_s={phase: median(each) for phase, each in of["phases_s"].items()},
            afterwards_s=median(of["afterwards_s"]),
            moved_bytes=max(of["moved_bytes"].values(), default=0),
            floor_s=floor_s,
            times_floor=median(seconds) / floor_s if floor_s else None,
            syncs=len(seconds),
            loader=of["loader"],
            load_calls=of["load_calls"],
        )
        made.append(row)
    return made


def _summary(seconds: Sequence[float], made: Sequence[SyncRow | RollbackRow]) -> dict[str, float]:
    """The ratio is to the first row that is made, native's."""
    typical_s = median(seconds)
    ratio = typical_s / (made[0].median_s if made else typical_s)
    return {"median_s": typical_s, "p95_s": percentile_95(seconds), "ratio_to_native": ratio}


def prove(strategy: Native, settings: Settings, times: int = 3) -> list[dict[str, Any]]:
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
    engine, model = strategy.engine, strategy.trainer.model
    dtype, staging = getattr(torch, engine.lora_dtype), strategy.store.root / STAGING
    yield "same base", None, lambda: match_base(engine, model, Processes(None))
    yield "probe", None, lambda: run_probe(ServingForm(model, ADAPTER, dtype), engine, staging)
    tokens = settings.prompt_tokens
    sampling = Sampling(n=1, max_tokens=tokens, temperature=1.0, seed=strategy.subject.seed, ignore_eos=True)
    for rows in settings.canary_rows:
        groups = strategy.generate(strategy.subject.fresh_prompts(rows, tokens), sampling)
        yield "canary", rows, partial(strategy.pusher.canary, groups)


def rollback_cells(settings: Settings, subject: Subject) -> list[Cell]:
    how = {"arguments": {"repeat": settings.each_way}, "warm": {"repeat": 1}}
    return [beside_native("rollback", go_back, subject, name, **how) for name in settings.others]


def go_back(strategy: Strategy, repeat: int) -> dict[str, Any]:
    """Worker: by case, seconds, and how far what is served then is from what the version served when it was new."""
    tokens = strategy.subject.sequences()

    def after(between: int) -> tuple[float, float]:
        strategy.trainer.randomise(0.2)
        strategy.sync()
        mark, then = strategy.mark(), strategy.logprobs(tokens)
        for _ in range(between):
            strategy.trainer.randomise(0.2)
            strategy.sync()
        seconds = strategy.rollback(mark).total_s
        return seconds, mean_abs_difference(strategy.logprobs(tokens), then)

    return {case: [after(between) for _ in range(repeat)] for case, between in strategy.rollback_cases.items()}


def rollback_rows(cell: Mapping[str, Any]) -> list[RollbackRow]:
    made: list[RollbackRow] = []
    for strategy, found in results(cell).items():
        for case, tries in found.items():
            seconds, errors = zip(*tries, strict=True)
            about = {"strategy": strategy, **cell["labels"], "case": case, "error_nats": max(errors)}
            made.append(RollbackRow(**about, **_summary(seconds, made)))
    return made


def endurance_cells(settings: Settings, subject: Subject) -> list[Cell]:
    """Each strategy alone: nothing is compared but the first syncs with the last."""
    syncs, rank = settings.endurance_syncs, {"rank": settings.rank}
    how: dict[str, Any] = {"arguments": {"syncs": syncs}, "warm": {"syncs": ENDURANCE_WARM}, "labels": rank}
    return [alone("endurance", "endurance", endure, subject, name, **how) for name in settings.strategies]


def endure(strategy: Strategy, syncs: int) -> list[dict[str, Any]]:
    """Worker: seconds of each sync and, every so often, what was resident; in tenths."""
    seconds, levels = list[float](), list[dict[str, Any]]()
    for done in range(syncs):
        strategy.trainer.nudge()
        seconds.append(strategy.sync().total_s)
        if done % max(1, syncs // (TENTHS * SAMPLES)) == 0:
            sizes = resident(), cuda_level(strategy.subject.device), on_tmpfs(strategy.folder)
            levels.append({"sync": done, **dict(zip(_SIZES, sizes, strict=True))})
    return tenths(seconds, levels)


def tenths(seconds: Sequence[float], levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for first, last in pairwise(len(seconds) * tenth // TENTHS for tenth in range(TENTHS + 1)):
        row: dict[str, Any] = {"first": first + 1, "last": last, "median_s": median(seconds[first:last])}
        seen = [level for level in levels if first <= level["sync"] < last]
        for name in _SIZES:
            sizes = [level[name] for level in seen]
            row[name] = None if None in sizes else median(sizes)
        made.append(row)
    return made
