"""What proving costs besides each push, whose own proofs (digest, slots) are phases of it: the same base and the probe
once an engine, the canary when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.adapters.files.disk import STAGING
from lora_grpo.bench.plan import Cell, Subject
from lora_grpo.bench.settings import Settings
from lora_grpo.bench.strategies import NATIVE
from lora_grpo.grpo.processes import Processes
from lora_grpo.types import Sampling

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.native import Native

TIMES = 3


def cell(settings: Settings, subject: Subject) -> Cell:
    """Of `native` alone."""
    given = {"canary_rows": list(settings.canary_rows), "prompt_tokens": settings.prompt_tokens}
    warm = {**given, "canary_rows": [], "times": 1}
    return Cell("sync/proofs", "proof", measure, (subject.with_strategy(NATIVE),), given, warm=warm)


def measure(strategy: Native, canary_rows: list[int], prompt_tokens: int, times: int = TIMES) -> list[dict[str, Any]]:
    """Worker: seconds of each proof, several times, and of as many pushes."""
    strategy.trainer.step()
    push_s = median([strategy.sync().total_s for _ in range(4 * times)])
    provers: list[tuple[str, int | None, Callable[[], object]]] = [
        ("same base", None, lambda: _match(strategy)),
        ("probe", None, lambda: _probe(strategy)),
        *(("canary", rows, _canary(strategy, rows, prompt_tokens)) for rows in canary_rows),
    ]
    found = []
    for proof, rows, prove in provers:
        median_s = median([_seconds(prove) for _ in range(times)])
        row = {"proof": proof, "rows": rows, "tokens": rows and prompt_tokens, "median_s": median_s, "times": times}
        found.append({**row, "ratio_to_push": median_s / push_s})
    return found


def _seconds(prove: Callable[[], object]) -> float:
    started = time.perf_counter()
    prove()
    return time.perf_counter() - started


def _match(strategy: Native) -> None:
    from lora_grpo.engines.delivery.base_match import match_base

    match_base(strategy.engine, strategy.trainer.model, Processes(None))


def _probe(strategy: Native) -> None:
    from lora_grpo.adapters.peft_form.serving import ServingForm
    from lora_grpo.bench.strategies.trainer import ADAPTER
    from lora_grpo.engines.delivery.probe import run_probe

    engine, model = strategy.engine, strategy.trainer.model
    form = ServingForm(model, ADAPTER, getattr(torch, engine.lora_dtype))
    run_probe(model, form, engine, strategy.store.root / STAGING)


def _canary(strategy: Native, rows: int, tokens: int) -> Callable[[], object]:
    """Completions as long as their prompts; making them is not part of the canary's cost."""
    sampling = Sampling(n=1, max_tokens=tokens, temperature=1.0, seed=strategy.subject.seed, ignore_eos=True)
    groups = strategy.generate(strategy.subject.fresh_prompts(rows, tokens), sampling)
    return lambda: strategy.pusher.canary(groups)
