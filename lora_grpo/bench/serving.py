"""How long a served policy takes to complete prompts, and a whole GRPO step with it (generate, train, sync)."""

import time
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch

from lora_grpo.bench.fidelity import truth
from lora_grpo.bench.gauges import Clock
from lora_grpo.bench.plan import BASE, SHARED, STOCK, Cell, Settings, Subject, alone, beside_native, results
from lora_grpo.bench.schema import DecodeRow, StepRow
from lora_grpo.bench.strategy import Strategy
from lora_grpo.grpo.advantages import group_advantages
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.policy import Policy
from lora_grpo.types import Sampling

SERVING = ("generate", "sync")  # the phases of a step in which strategies differ
PHASES = (*SERVING, "train")


def decode_cells(settings: Settings, subject: Subject) -> list[Cell]:
    """`native` beside each other strategy, but beside the base and the stock CPU kernels at once: before, after and
    what they are measured by alternate. With the truth of what no other part looks at."""
    others = [name for name in settings.others if name != STOCK or settings.device == "cpu"]
    together = [name for name in others if name in (BASE, STOCK)]
    asked, labels, planned = {"settings": settings}, {"prompt_tokens": settings.prompt_tokens}, list[Cell]()
    how = {"arguments": asked, "warm": {"settings": settings.replace(lengths=(2,), repeat=1, least_s=0.0)}}
    for group in filter(None, (together, *([name] for name in others if name not in together))):
        planned.append(beside_native("decode", measure_decode, subject, *group, **how, labels=labels))
        looked_at = [name for name in group if settings.truth and name in (SHARED, STOCK)]
        planned += [alone("decode/truth", "truth", truth, subject, name) for name in looked_at]
    return planned


def measure_decode(strategy: Strategy, settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Worker: seconds of whole batches by rows and completion length (1: the prefill and one token)."""
    strategy.renew()

    def taken(rows: int, length: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < settings.each_way or sum(seconds) < settings.least_s:
            seconds.append(generate_seconds(strategy, rows, settings.prompt_tokens, length))
        return seconds

    lengths = sorted({1, *settings.lengths})
    return {str(rows): {str(length): taken(rows, length) for length in lengths} for rows in settings.rows}


def generate_seconds(strategy: Strategy, rows: int, prompt_tokens: int, length: int) -> float:
    """Seconds to complete `rows` prompts that no cache has seen by exactly `length` tokens each; on a GPU greedily:
    there requests with a seed are drawn one after the other, which at many rows takes as long as the model does."""
    prompts = strategy.subject.fresh_prompts(rows, prompt_tokens)
    temperature = 1.0 if strategy.subject.device == "cpu" else 0.0
    sampling = Sampling(n=1, max_tokens=length, temperature=temperature, seed=strategy.subject.seed, ignore_eos=True)
    started = time.perf_counter()
    strategy.generate(prompts, sampling)
    return time.perf_counter() - started


def decode_rows(cell: Mapping[str, Any]) -> list[DecodeRow]:
    found, made, labels = results(cell), list[DecodeRow](), cell["labels"]
    native = next(iter(found.values()))
    sizes = [(rows, length) for rows, by_length in native.items() for length in sorted(map(int, by_length))[1:]]
    for (rows, length), (strategy, of) in product(sizes, found.items()):
        own_s, native_s = _decode_seconds(of[rows], length), _decode_seconds(native[rows], length)
        row = DecodeRow(
            **{"strategy": strategy, **labels, "rows": int(rows), "completion_tokens": length},
            tokens_per_s=int(rows) * length / own_s["generate"],
            prefill_tokens_per_s=int(rows) * labels["prompt_tokens"] / own_s["prefill"],
            **{f"{phase}_s": seconds for phase, seconds in own_s.items()},
            **{f"{phase}_ratio_to_native": seconds / native_s[phase] for phase, seconds in own_s.items()},
        )
        made.append(row)
    return made


def _decode_seconds(measured: Mapping[str, Sequence[float]], length: int) -> dict[str, float]:
    whole, first = median(measured[str(length)]), median(measured["1"])
    return {"generate": whole, "prefill": first, "tpot": (whole - first) / (length - 1)}


def step_cells(settings: Settings, subject: Subject) -> list[Cell]:
    sizes = {"rows": settings.step_rows, "prompt_tokens": settings.prompt_tokens}
    labels = {**sizes, "completion_tokens": settings.step_tokens}
    how = {"arguments": {"settings": settings}, "warm": {"settings": settings.replace(repeat=1)}, "labels": labels}
    return [beside_native("step", measure_steps, subject, name, **how) for name in settings.others]


def measure_steps(strategy: Strategy, settings: Settings) -> dict[str, list[float]]:
    """Worker: steps on random prompts, with advantages drawn at random; seconds by phase."""
    config = GRPOConfig(
        num_generations=settings.group,
        per_device_train_batch_size=settings.group,
        gradient_accumulation_steps=settings.step_rows // settings.group,
        max_completion_length=settings.step_tokens,
        total_steps=settings.each_way,
        # Two trainers and two engines share one GPU.
        gradient_checkpointing=strategy.subject.device != "cpu",
    )
    policy = Policy(strategy.trainer.model, config)
    done = [_step(strategy, policy, settings) for _ in range(settings.each_way)]
    return {phase: [seconds[phase] for seconds in done] for phase in PHASES}


def _step(strategy: Strategy, policy: Policy, settings: Settings) -> dict[str, float]:
    config, clock = policy.config, Clock(strategy.subject.device)
    drawn = strategy.subject.fresh_prompts(settings.step_rows // settings.group, settings.prompt_tokens)
    sampling = Sampling(n=settings.group, max_tokens=settings.step_tokens, seed=0, ignore_eos=True)
    with clock("generate"):
        groups = strategy.generate(drawn, sampling)
    with clock("train"):
        advantages_B = group_advantages(torch.rand(settings.step_rows), settings.group, config.scale_rewards)
        policy.update(policy.prepare(Batch.from_groups(groups, advantages_B)))
    with clock("sync"):
        strategy.sync()
    return clock.seconds


def step_rows(cell: Mapping[str, Any]) -> list[StepRow]:
    """Both strategies of a pair. Training is the same work whatever syncs: both are given the median of all its rounds,
    so that its noise, which is more than what they differ in, favours neither."""
    train_s = median(s for done in cell["rounds"] for s in done["result"]["train"])
    parts = {strategy: {phase: median(found[phase]) for phase in SERVING} for strategy, found in results(cell).items()}
    native_s = sum(next(iter(parts.values())).values())
    return [
        StepRow(
            strategy=strategy,
            **cell["labels"],
            **{f"{phase}_s": seconds for phase, seconds in serving.items()},
            train_s=train_s,
            step_s=(serving_s := sum(serving.values())) + train_s,
            ratio_to_native=(serving_s + train_s) / (native_s + train_s),
            serving_ratio_to_native=serving_s / native_s,
        )
        for strategy, serving in parts.items()
    ]
