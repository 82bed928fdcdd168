"""The JSON that comes of the suite: a document of rows. Units are in the names."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from lora_grpo.bench.settings import Settings

Winner: TypeAlias = Literal["native", "merge"]


class Row(BaseModel):
    """A line of a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str
    shape: str
    engine: str | None = None
    """`Settings.engine`."""


class SyncRow(Row):
    """`ratio_to_native` compares with syncs of `native`: those that alternated with these, or where `against` is
    "unpaired" those of its first turn. `decodes_like` names the strategy whose decode figures are this one's too.
    `loader` is how our engine took the adapter (`LoadReceipt`); `load_calls` a merge's calls of `load_weights`."""

    against: str
    rank: int
    targets: str
    median_s: float
    p95_s: float
    phases_s: dict[str, float]
    afterwards_s: float
    moved_bytes: int
    floor_s: float
    times_floor: float | None
    ratio_to_native: float
    syncs: int
    decodes_like: str
    loader: str | None = None
    load_calls: int | None = None


class TruthRow(Row):
    """Mean |difference of log-probs| over tokens, nats: `error` served against the fp32 reference; `noise` of bf16
    itself; `signal` the adapter against the base."""

    error_nats: float
    noise_nats: float
    signal_nats: float
    passed: bool
    same_bits: bool | None = None
    """Of a shared base: every weight that the trainer sees is the checkpoint's, bit for bit."""


class ProofRow(Row):
    """What is proven besides each push: seconds of it, and as a multiple of a push measured in the same process.

    `rows` completions of `tokens` tokens each were looked at (None: none)."""

    proof: str
    rows: int | None
    tokens: int | None
    median_s: float
    ratio_to_push: float
    times: int


class MemoryRow(Row):
    """`kind`: pss on the CPU, CUDA allocated on a GPU (with `reserved_peak_bytes`), the KV cache of `kv_tokens`
    included (None: set by configuration, which tells nothing). `weights_bytes` go when trainer and engine let go of
    the base, of which one copy is `copy_bytes`. `before_bytes`: the level before the trainer was loaded."""

    kind: Literal["pss", "cuda"]
    before_bytes: int | None = None
    trainer_bytes: int
    engine_bytes: int
    sync_bytes: int
    tmpfs_bytes: int
    peak_bytes: int
    reserved_peak_bytes: int | None
    kv_tokens: int | None
    weights_bytes: int | None = None
    copy_bytes: int | None = None
    ratio_to_native: float | None = None

    @property
    def copies(self) -> float | None:
        """Copies of the base that are resident."""
        return None if self.weights_bytes is None or not self.copy_bytes else self.weights_bytes / self.copy_bytes


class DecodeRow(Row):
    """`tpot_s` is time per output token of one row; ratios compare with `native`. `kv_tokens` fit the KV cache (None on
    the CPU). `threads` of the worker's torch."""

    rows: int
    prompt_tokens: int
    completion_tokens: int
    generate_s: float
    prefill_s: float
    tpot_s: float
    tokens_per_s: float
    prefill_tokens_per_s: float
    tpot_ratio_to_native: float
    prefill_ratio_to_native: float
    generate_ratio_to_native: float
    kv_tokens: int | None
    threads: int | None = None


class BreakEvenRow(Row):
    """At how many completion tokens a step takes as long on `strategy` as on `native` (None: at no number), and which
    is faster beyond."""

    rows: int
    sync_gain_s: float
    decode_loss_s_per_token: float
    prefill_loss_s: float
    completion_tokens: float | None
    beyond: Winner
    measured_up_to_tokens: int


class FidelityRow(Row):
    """`served_error_nats` engine against fp32 reference, `weights_error_nats` the served weights alone (computed in
    fp32), `lost_share` |served update - update| / |update|, `changed_share` of the weights that moved at all."""

    learning_rate: float
    updates: int
    signal_nats: float
    served_error_nats: float
    weights_error_nats: float
    lost_share: float
    changed_share: float


class DriftRow(Row):
    """The trainer's frozen base after so many syncs, against what it was."""

    cycles: int
    mean_relative: float
    max_abs: float
    logprob_shift_nats: float


class StepRow(Row):
    """Medians by phase; `train_s` is that of all rounds of a pair, both strategies' alike. `serving_ratio_to_native`
    leaves it out: generate and sync alone."""

    rows: int
    prompt_tokens: int
    completion_tokens: int
    generate_s: float
    train_s: float
    sync_s: float
    step_s: float
    ratio_to_native: float
    serving_ratio_to_native: float | None = None


class RollbackRow(Row):
    """`error_nats`: log-probs served afterwards against those served when the version was new."""

    case: str
    median_s: float
    p95_s: float
    ratio_to_native: float
    error_nats: float


class EnduranceRow(Row):
    """One tenth of many syncs: medians. `memory_bytes` is the process's proportional set, `cuda_bytes` what it has
    allocated on a GPU."""

    rank: int
    first: int
    last: int
    median_s: float
    memory_bytes: float
    cuda_bytes: float | None
    tmpfs_bytes: float


class SlopeRow(Row):
    """Least-squares lines through the tenths: changes per 1,000 syncs, also as shares of the medians."""

    rank: int
    syncs: int
    median_s: float
    seconds_per_1000: float
    memory_bytes_per_1000: float
    cuda_bytes_per_1000: float | None
    tmpfs_bytes_per_1000: float
    time_share: float
    memory_share: float
    tmpfs_share: float


class Document(BaseModel):
    """One run of the suite, or several of one machine joined. It took `seconds`, all its starts together."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    command: str
    started_at: str
    seconds: float | None = None
    complete: bool
    card: dict[str, Any]
    bandwidth_bytes_per_s: dict[str, float]
    settings: dict[str, Settings]
    failures: list[str]
    notes: list[str] = []
    """What a reader must know of this run besides."""
    sync: list[SyncRow] = []
    proof: list[ProofRow] = []
    truth: list[TruthRow] = []
    memory: list[MemoryRow] = []
    decode: list[DecodeRow] = []
    break_even: list[BreakEvenRow] = []
    fidelity: list[FidelityRow] = []
    drift: list[DriftRow] = []
    step: list[StepRow] = []
    rollback: list[RollbackRow] = []
    endurance: list[EnduranceRow] = []
    slopes: list[SlopeRow] = []


TABLES = ("sync", "proof", "truth", "memory", "decode", "fidelity", "drift", "step", "rollback", "endurance")
"""What is measured; the other tables of a document follow from these."""
