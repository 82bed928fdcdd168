"""The figures as tables for people: units in the heads, native first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, TypeAlias

from lora_grpo.bench.breakeven import wins
from lora_grpo.bench.schema import Document, ProofRow, Row, SyncRow

Line: TypeAlias = dict[str, Any]
Columns: TypeAlias = Mapping[str, Callable[[Any], Any]]
"""Heads and what of a row stands under them."""


def tables(document: Document) -> Iterator[tuple[str, list[Line]]]:
    """(title, lines) of every table that holds anything."""
    for name, (title, columns) in _TABLES.items():
        lines = [_line(row, columns) for row in getattr(document, name)]
        if lines:
            yield title, lines


def ms(seconds: float) -> float:
    return 1e3 * seconds


def _line(row: Row, columns: Columns) -> Line:
    known = {"strategy": row.strategy, "shape": row.shape, "engine": row.engine}
    return {**known, **{head: value(row) for head, value in columns.items()}}


def _scaled(name: str, factor: float) -> Callable[[Any], float | None]:
    field = attrgetter(name)
    return lambda row: None if (value := field(row)) is None else factor * value


def _ms(name: str) -> Callable[[Any], float | None]:
    return _scaled(name, 1e3)


def _mib(name: str) -> Callable[[Any], float | None]:
    return _scaled(name, 1 / (1 << 20))


def _percent(name: str) -> Callable[[Any], float | None]:
    return _scaled(name, 100)


def _phases(row: SyncRow) -> str:
    return ", ".join(f"{name} {ms(value):.2f}" for name, value in row.phases_s.items())


def _occasion(row: ProofRow) -> str:
    return "when asked for" if row.proof == "canary" else "once an engine"


_SYNC: Columns = {
    "rank": attrgetter("rank"),
    "targets": attrgetter("targets"),
    "median ms": _ms("median_s"),
    "p95 ms": _ms("p95_s"),
    "x native": attrgetter("ratio_to_native"),
    "against": attrgetter("against"),
    "load_weights calls": attrgetter("load_calls"),
    "moved MB": _scaled("moved_bytes", 1e-6),
    "x floor": attrgetter("times_floor"),
    "after ms": _ms("afterwards_s"),
    "loader": attrgetter("loader"),
    "phases, ms": _phases,
}
_PROOF: Columns = {
    "proof": attrgetter("proof"),
    "when": _occasion,
    "rows": attrgetter("rows"),
    "tokens a row": attrgetter("tokens"),
    "median ms": _ms("median_s"),
    "x a push": attrgetter("ratio_to_push"),
}
_TRUTH: Columns = {
    "error, nats": attrgetter("error_nats"),
    "bf16 noise, nats": attrgetter("noise_nats"),
    "adapter's effect, nats": attrgetter("signal_nats"),
    "trainer's base, bit for bit": lambda row: None if row.same_bits is None else "same" if row.same_bits else "OTHER",
    "verdict": lambda row: "serves it" if row.passed else "SERVES ANOTHER POLICY",
}
_MEMORY: Columns = {
    "of": lambda row: "PSS" if row.kind == "pss" else "CUDA allocated",
    "before MiB": _mib("before_bytes"),
    "trainer MiB": _mib("trainer_bytes"),
    "engine MiB": _mib("engine_bytes"),
    "syncs MiB": _mib("sync_bytes"),
    "tmpfs MiB": _mib("tmpfs_bytes"),
    "peak MiB": _mib("peak_bytes"),
    "CUDA reserved MiB": _mib("reserved_peak_bytes"),
    "x native": attrgetter("ratio_to_native"),
    "base weights MiB": _mib("weights_bytes"),
    "copies of the base": attrgetter("copies"),
    "KV cache tokens": attrgetter("kv_tokens"),
}
_DECODE: Columns = {
    "rows": attrgetter("rows"),
    "prompt tokens": attrgetter("prompt_tokens"),
    "new tokens": attrgetter("completion_tokens"),
    "ms a token": _ms("tpot_s"),
    "x native (decode)": attrgetter("tpot_ratio_to_native"),
    "tokens/s": attrgetter("tokens_per_s"),
    "prefill ms": _ms("prefill_s"),
    "prefill tokens/s": attrgetter("prefill_tokens_per_s"),
    "x native (prefill)": attrgetter("prefill_ratio_to_native"),
    "KV cache tokens": attrgetter("kv_tokens"),
    "threads": attrgetter("threads"),
}
_BREAK_EVEN: Columns = {
    "rows": attrgetter("rows"),
    "sync behind native, ms": _ms("sync_gain_s"),
    "prefill ahead, ms": _ms("prefill_loss_s"),
    "decode ahead, ms a token": _ms("decode_loss_s_per_token"),
    "merging wins": wins,
    "measured up to, tokens": attrgetter("measured_up_to_tokens"),
}
_FIDELITY: Columns = {
    "learning rate": attrgetter("learning_rate"),
    "updates": attrgetter("updates"),
    "update's effect, nats": attrgetter("signal_nats"),
    "error as served, nats": attrgetter("served_error_nats"),
    "error of the weights, nats": attrgetter("weights_error_nats"),
    "update lost, %": _percent("lost_share"),
    "weights moved, %": _percent("changed_share"),
}
_DRIFT: Columns = {
    "syncs": attrgetter("cycles"),
    "mean drift, % of |W|": _percent("mean_relative"),
    "largest": attrgetter("max_abs"),
    "base's log-probs moved, nats": attrgetter("logprob_shift_nats"),
}
_STEP: Columns = {
    "rows": attrgetter("rows"),
    "prompt tokens": attrgetter("prompt_tokens"),
    "new tokens": attrgetter("completion_tokens"),
    "generate s": attrgetter("generate_s"),
    "train s": attrgetter("train_s"),
    "sync s": attrgetter("sync_s"),
    "step s": attrgetter("step_s"),
    "x native": attrgetter("ratio_to_native"),
    "x native (generate + sync)": attrgetter("serving_ratio_to_native"),
}
_ROLLBACK: Columns = {
    "version": attrgetter("case"),
    "median ms": _ms("median_s"),
    "p95 ms": _ms("p95_s"),
    "x native": attrgetter("ratio_to_native"),
    "off what it was, nats": attrgetter("error_nats"),
}
_ENDURANCE: Columns = {
    "rank": attrgetter("rank"),
    "syncs": lambda row: f"{row.first} to {row.last}",
    "median ms": _ms("median_s"),
    "PSS MiB": _mib("memory_bytes"),
    "CUDA allocated MiB": _mib("cuda_bytes"),
    "tmpfs MiB": _mib("tmpfs_bytes"),
}
_SLOPES: Columns = {
    "rank": attrgetter("rank"),
    "syncs": attrgetter("syncs"),
    "ms": _ms("seconds_per_1000"),
    "ms, %": _percent("time_share"),
    "PSS MiB": _mib("memory_bytes_per_1000"),
    "PSS, %": _percent("memory_share"),
    "CUDA allocated MiB": _mib("cuda_bytes_per_1000"),
    "tmpfs MiB": _mib("tmpfs_bytes_per_1000"),
    "tmpfs, %": _percent("tmpfs_share"),
}
_TABLES: dict[str, tuple[str, Columns]] = {
    "sync": ("Sync: until the engine can sample from the new policy", _SYNC),
    "proof": ("Proofs that are not part of a push", _PROOF),
    "truth": ("Truth: log-probs of the served policy against an fp32 reference", _TRUTH),
    "memory": ("Memory: trainer and engine in one process", _MEMORY),
    "decode": ("Decode: completions of a served policy", _DECODE),
    "break_even": ("Break-even: the completion lengths at which merging is faster", _BREAK_EVEN),
    "fidelity": ("Fidelity: what is left of an update", _FIDELITY),
    "drift": ("Drift: the trainer's frozen base after many syncs", _DRIFT),
    "step": ("Step: generate, train, sync", _STEP),
    "rollback": ("Rollback: back on an earlier version", _ROLLBACK),
    "endurance": ("Endurance: many syncs on one engine, a tenth a line", _ENDURANCE),
    "slopes": ("Endurance: change per 1,000 syncs, by lines through the tenths", _SLOPES),
}
