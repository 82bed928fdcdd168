"""What completions cost once a policy is served: time per output token, prefill, tokens a second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_grpo.bench import fidelity
from lora_grpo.bench.plan import Cell, Settings, Subject, beside_native, results
from lora_grpo.bench.schema import DecodeRow
from lora_grpo.bench.strategies import BASE, SHARED, STOCK
from lora_grpo.types import Sampling

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy


def cells(settings: Settings, subject: Subject) -> list[Cell]:
    """`native` beside each other strategy, but beside the base and the stock CPU kernels at once: before, after and
    what they are measured by alternate. With the truth of what no other part looks at."""
    others = [name for name in settings.others if name != STOCK or settings.device == "cpu"]
    together = [name for name in others if name in (BASE, STOCK)]
    how: dict[str, Any] = {
        "arguments": {"settings": settings},
        "warm": {"settings": settings.replace(lengths=(2,), repeat=1, least_s=0.0)},
        "labels": {"prompt_tokens": settings.prompt_tokens},
    }
    planned: list[Cell] = []
    for group in filter(None, (together, *([name] for name in others if name not in together))):
        planned.append(beside_native("decode", measure, subject, *group, **how))
        looked_at = [name for name in group if settings.truth and name in (SHARED, STOCK)]
        planned += [fidelity.truth_cell("decode", subject.with_strategy(name)) for name in looked_at]
    return planned


def measure(strategy: Strategy, settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Worker: seconds of whole batches by rows and completion length (1: the prefill and one token), each taken
    as often as is asked for and for `least_s` seconds at least."""
    strategy.renew()

    def taken(rows: int, length: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < settings.each_way or sum(seconds) < settings.least_s:
            seconds.append(generate_seconds(strategy, rows, settings.prompt_tokens, length))
        return seconds

    lengths = sorted({1, *settings.lengths})
    return {str(rows): {str(length): taken(rows, length) for length in lengths} for rows in settings.rows}


def generate_seconds(strategy: Strategy, rows: int, prompt_tokens: int, length: int) -> float:
    """Seconds to complete `rows` prompts that no cache has seen by exactly `length` tokens each. Drawn at temperature
    1, but on a GPU greedily: requests that have a seed are drawn there one after the other, which takes as long as the
    model does at many rows and hides what strategies differ in."""
    prompts = strategy.subject.fresh_prompts(rows, prompt_tokens)
    temperature = 1.0 if strategy.subject.device == "cpu" else 0.0
    sampling = Sampling(n=1, max_tokens=length, temperature=temperature, seed=strategy.subject.seed, ignore_eos=True)
    started = time.perf_counter()
    strategy.generate(prompts, sampling)
    return time.perf_counter() - started


def rows(cell: Mapping[str, Any]) -> list[DecodeRow]:
    medians_s = {
        strategy: {int(rows): {int(length): median(s) for length, s in of.items()} for rows, of in found.items()}
        for strategy, found in results(cell).items()
    }
    native = next(iter(medians_s.values()))
    return [
        _row({"strategy": strategy, **cell["labels"]}, own[count], native[count], count, length)
        for count in native
        for length in sorted(native[count])[1:]
        for strategy, own in medians_s.items()
    ]


def _row(labels: dict[str, Any], own: dict[int, float], native: dict[int, float], rows: int, length: int) -> DecodeRow:
    """Of median seconds by completion length, of which the shortest is 1."""
    own_s, native_s = (
        {"generate": s[length], "prefill": s[1], "tpot": (s[length] - s[1]) / (length - 1)} for s in (own, native)
    )
    return DecodeRow(
        **labels,
        rows=rows,
        completion_tokens=length,
        tokens_per_s=rows * length / own[length],
        prefill_tokens_per_s=rows * labels["prompt_tokens"] / own[1],
        **{f"{phase}_s": seconds for phase, seconds in own_s.items()},
        **{f"{phase}_ratio_to_native": seconds / native_s[phase] for phase, seconds in own_s.items()},
    )
