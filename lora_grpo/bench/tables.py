"""The figures as tables for people: units in the heads, native first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from lora_grpo.bench.breakeven import wins
from lora_grpo.bench.schema import (
    BreakEvenRow,
    DecodeRow,
    Document,
    DriftRow,
    FidelityRow,
    MemoryRow,
    RollbackRow,
    StepRow,
    SyncRow,
    TruthRow,
)

Line: TypeAlias = dict[str, Any]
_MIB = 1 << 20


def tables(document: Document) -> Iterator[tuple[str, list[Line]]]:
    """(title, lines) of every table that holds anything."""
    for name, title, line in _TABLES:
        lines = [line(row) for row in getattr(document, name)]
        if lines:
            yield title, lines


def _sync(row: SyncRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "rank": row.rank,
        "targets": row.targets,
        "median ms": ms(row.median_s),
        "p95 ms": ms(row.p95_s),
        "x native": row.ratio_to_native,
        "moved MB": row.moved_bytes / 1e6,
        "x floor": row.times_floor,
        "after ms": ms(row.afterwards_s),
        "phases, ms": ", ".join(f"{name} {ms(value):.2f}" for name, value in row.phases_s.items()),
    }


def _truth(row: TruthRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "error, nats": row.error_nats,
        "bf16 noise, nats": row.noise_nats,
        "adapter's effect, nats": row.signal_nats,
        "verdict": "serves it" if row.passed else "SERVES ANOTHER POLICY",
    }


def _memory(row: MemoryRow) -> Line:
    kind = "PSS" if row.kind == "pss" else "CUDA allocated"
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "of": kind,
        "trainer MiB": row.trainer_bytes / _MIB,
        "engine MiB": row.engine_bytes / _MIB,
        "syncs MiB": row.sync_bytes / _MIB,
        "tmpfs MiB": row.tmpfs_bytes / _MIB,
        "peak MiB": row.peak_bytes / _MIB,
        "CUDA reserved MiB": None if row.reserved_peak_bytes is None else row.reserved_peak_bytes / _MIB,
        "x native": row.ratio_to_native,
        "KV cache tokens": row.kv_tokens,
    }


def _decode(row: DecodeRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "rows": row.rows,
        "prompt tokens": row.prompt_tokens,
        "new tokens": row.completion_tokens,
        "ms a token": ms(row.tpot_s),
        "x native (decode)": row.tpot_ratio_to_native,
        "tokens/s": row.tokens_per_s,
        "prefill ms": ms(row.prefill_s),
        "prefill tokens/s": row.prefill_tokens_per_s,
        "x native (prefill)": row.prefill_ratio_to_native,
        "KV cache tokens": row.kv_tokens,
    }


def _break_even(row: BreakEvenRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "rows": row.rows,
        "sync behind native, ms": ms(row.sync_gain_s),
        "prefill ahead, ms": ms(row.prefill_loss_s),
        "decode ahead, ms a token": ms(row.decode_loss_s_per_token),
        "merging wins": wins(row),
        "measured up to, tokens": row.measured_up_to_tokens,
    }


def _fidelity(row: FidelityRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "learning rate": row.learning_rate,
        "updates": row.updates,
        "update's effect, nats": row.signal_nats,
        "error as served, nats": row.served_error_nats,
        "error of the weights, nats": row.weights_error_nats,
        "update lost, %": 100 * row.lost_share,
        "weights moved, %": 100 * row.changed_share,
    }


def _drift(row: DriftRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "syncs": row.cycles,
        "mean drift, % of |W|": 100 * row.mean_relative,
        "largest": row.max_abs,
        "base's log-probs moved, nats": row.logprob_shift_nats,
    }


def _step(row: StepRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "rows": row.rows,
        "prompt tokens": row.prompt_tokens,
        "new tokens": row.completion_tokens,
        "generate s": row.generate_s,
        "train s": row.train_s,
        "sync s": row.sync_s,
        "step s": row.step_s,
        "x native": row.ratio_to_native,
    }


def _rollback(row: RollbackRow) -> Line:
    return {
        "strategy": row.strategy,
        "shape": row.shape,
        "version": row.case,
        "median ms": ms(row.median_s),
        "p95 ms": ms(row.p95_s),
        "x native": row.ratio_to_native,
        "off what it was, nats": row.error_nats,
    }


def ms(seconds: float) -> float:
    return 1e3 * seconds


_TABLES: tuple[tuple[str, str, Callable[[Any], Line]], ...] = (
    ("sync", "Sync: until the engine can sample from the new policy", _sync),
    ("truth", "Truth: log-probs of the served policy against an fp32 reference", _truth),
    ("memory", "Memory: trainer and engine in one process", _memory),
    ("decode", "Decode: completions of a served policy", _decode),
    ("break_even", "Break-even: the completion lengths at which merging is faster", _break_even),
    ("fidelity", "Fidelity: what is left of an update", _fidelity),
    ("drift", "Drift: the trainer's frozen base after many syncs", _drift),
    ("step", "Step: generate, train, sync", _step),
    ("rollback", "Rollback: back on an earlier version", _rollback),
)
