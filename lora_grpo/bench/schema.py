"""The JSON that comes of the suite, a document of rows, and how people are shown it. Units are in names and heads."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, computed_field

from lora_grpo.bench.plan import Settings

Winner: TypeAlias = Literal["native", "merge"]
MEMORY_KINDS = {"resident": "resident", "pss": "proportional set", "cuda": "CUDA allocated"}
TOLERANCE = 3.0  # times the bf16 noise by which a served policy may differ from the reference


class Column(NamedTuple):
    head: str
    shown: Callable[[Any], Any] = lambda value: value


def scaled(factor: float) -> Callable[[float], float]:
    return lambda value: factor * value


def _phases(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {ms(value):.2f}" for name, value in seconds.items())


ms, percent, mib = scaled(1e3), scaled(100), scaled(1 / (1 << 20))


def figure(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Row(BaseModel):
    """A line of a table. Results that were measured earlier may have more columns."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    strategy: Annotated[str, Column("strategy")]
    shape: Annotated[str, Column("shape")]
    engine: Annotated[str | None, Column("engine")] = None

    besides: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}  # what people are shown that is no field, by its head

    def for_people(self) -> dict[str, Any]:
        line = {
            column.head: None if (value := getattr(self, name)) is None else column.shown(value)
            for name, field in type(self).model_fields.items()
            for column in field.metadata
            if isinstance(column, Column)
        }
        return line | {head: shown(self) for head, shown in self.besides.items()}


class SyncRow(Row):
    """`ratio_to_native` compares with syncs of `native`: those that alternated with these, or where `against` is
    "unpaired" those of its first turn. `loader` is how our engine took the adapter (`LoadReceipt`)."""

    rank: Annotated[int, Column("rank")]
    targets: Annotated[str, Column("targets")]
    median_s: Annotated[float, Column("median ms", ms)]
    p95_s: Annotated[float, Column("p95 ms", ms)]
    ratio_to_native: Annotated[float, Column("x native")]
    against: Annotated[str, Column("against")]
    load_calls: Annotated[int | None, Column("load_weights calls")] = None
    moved_bytes: Annotated[int, Column("moved MB", scaled(1e-6))]
    floor_s: float
    times_floor: Annotated[float | None, Column("x floor")]
    afterwards_s: Annotated[float, Column("after ms", ms)]
    loader: Annotated[str | None, Column("loader")] = None
    phases_s: Annotated[dict[str, float], Column("phases, ms", _phases)]
    syncs: int


class TruthRow(Row):
    """Mean |difference of log-probs| over tokens, nats: `error` served against the fp32 reference; `noise` of bf16
    itself; `signal` the adapter against the base."""

    error_nats: Annotated[float, Column("error, nats")]
    noise_nats: Annotated[float, Column("bf16 noise, nats")]
    signal_nats: Annotated[float, Column("adapter's effect, nats")]
    same_bits: Annotated[bool | None, Column("trainer's base", lambda same: "same bits" if same else "OTHER")] = None
    """Of a shared base: every weight that the trainer sees is the checkpoint's, bit for bit."""
    besides = {"verdict": lambda row: "serves it" if row.passed else "SERVES ANOTHER POLICY"}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return self.error_nats <= TOLERANCE * self.noise_nats and self.same_bits is not False


class ProofRow(Row):
    """What is proven besides each push, on `rows` completions (None: none); the push is of the same process."""

    proof: Annotated[str, Column("proof")]
    rows: Annotated[int | None, Column("rows")]
    tokens: Annotated[int | None, Column("tokens a row")]
    median_s: Annotated[float, Column("median ms", ms)]
    ratio_to_push: Annotated[float, Column("x a push")]
    times: int
    besides = {"when": lambda row: "when asked for" if row.proof == "canary" else "once an engine"}


class MemoryRow(Row):
    """`kind`: resident on the CPU (earlier results: pss), CUDA allocated on a GPU, the KV cache included.
    `weights_bytes` go when trainer and engine let go of the base, of which one copy is `copy_bytes`."""

    kind: Annotated[Literal["resident", "pss", "cuda"], Column("of", MEMORY_KINDS.__getitem__)]
    before_bytes: Annotated[int | None, Column("before MiB", mib)] = None
    trainer_bytes: Annotated[int, Column("trainer MiB", mib)]
    engine_bytes: Annotated[int, Column("engine MiB", mib)]
    sync_bytes: Annotated[int, Column("syncs MiB", mib)]
    tmpfs_bytes: Annotated[int, Column("tmpfs MiB", mib)]
    peak_bytes: Annotated[int, Column("peak MiB", mib)]
    reserved_peak_bytes: Annotated[int | None, Column("CUDA reserved MiB", mib)]
    ratio_to_native: Annotated[float | None, Column("x native")] = None
    weights_bytes: Annotated[int | None, Column("base weights MiB", mib)] = None
    copy_bytes: int | None = None
    besides = {"copies of the base": lambda row: row.copies}

    @property
    def copies(self) -> float | None:
        return None if self.weights_bytes is None or not self.copy_bytes else self.weights_bytes / self.copy_bytes


class BatchRow(Row):
    rows: Annotated[int, Column("rows")]
    prompt_tokens: Annotated[int, Column("prompt tokens")]
    completion_tokens: Annotated[int, Column("new tokens")]


class DecodeRow(BatchRow):
    """`tpot_s` is time per output token of one row; ratios compare with `native`."""

    generate_s: float
    tpot_s: Annotated[float, Column("ms a token", ms)]
    tpot_ratio_to_native: Annotated[float, Column("x native (decode)")]
    tokens_per_s: Annotated[float, Column("tokens/s")]
    prefill_s: Annotated[float, Column("prefill ms", ms)]
    prefill_tokens_per_s: Annotated[float, Column("prefill tokens/s")]
    prefill_ratio_to_native: Annotated[float, Column("x native (prefill)")]
    generate_ratio_to_native: float


class BreakEvenRow(Row):
    """At how many completion tokens a step takes as long as on `native` (None: at no number), and who wins beyond."""

    rows: Annotated[int, Column("rows")]
    sync_gain_s: Annotated[float, Column("sync behind native, ms", ms)]
    prefill_loss_s: Annotated[float, Column("prefill ahead, ms", ms)]
    decode_loss_s_per_token: Annotated[float, Column("decode ahead, ms a token", ms)]
    completion_tokens: float | None
    beyond: Winner
    measured_up_to_tokens: Annotated[int, Column("measured up to, tokens")]
    besides = {"merging wins": lambda row: row.merging_wins}

    @property
    def merging_wins(self) -> str:
        if self.completion_tokens is None:
            return "always" if self.beyond == "merge" else "never"
        return f"{'from' if self.beyond == 'merge' else 'up to'} {self.completion_tokens:,.0f} tokens"


class FidelityRow(Row):
    """`served_error_nats` engine against fp32 reference, `lost_share` |served update - update| / |update|."""

    learning_rate: Annotated[float, Column("learning rate")]
    updates: Annotated[int, Column("updates")]
    signal_nats: Annotated[float, Column("update's effect, nats")]
    served_error_nats: Annotated[float, Column("error as served, nats")]
    lost_share: Annotated[float, Column("update lost, %", percent)]


class DriftRow(Row):
    cycles: Annotated[int, Column("syncs")]
    mean_relative: Annotated[float, Column("mean drift, % of |W|", percent)]
    max_abs: Annotated[float, Column("largest")]
    logprob_shift_nats: Annotated[float, Column("base's log-probs moved, nats")]


class StepRow(BatchRow):
    """Medians; `train_s` is of all rounds of a pair, both strategies' alike, no part of `serving_ratio_to_native`."""

    generate_s: Annotated[float, Column("generate s")]
    train_s: Annotated[float, Column("train s")]
    sync_s: Annotated[float, Column("sync s")]
    step_s: Annotated[float, Column("step s")]
    ratio_to_native: Annotated[float, Column("x native")]
    serving_ratio_to_native: Annotated[float | None, Column("x native (generate + sync)")] = None


class RollbackRow(Row):
    """`error_nats`: log-probs served afterwards against those served when the version was new."""

    case: Annotated[str, Column("version")]
    median_s: Annotated[float, Column("median ms", ms)]
    p95_s: Annotated[float, Column("p95 ms", ms)]
    ratio_to_native: Annotated[float, Column("x native")]
    error_nats: Annotated[float, Column("off what it was, nats")]


class EnduranceRow(Row):
    """One tenth of many syncs: medians. `memory_bytes` is what of the process is resident."""

    rank: Annotated[int, Column("rank")]
    first: Annotated[int, Column("syncs from")]
    last: Annotated[int, Column("to")]
    median_s: Annotated[float, Column("median ms", ms)]
    memory_bytes: Annotated[float, Column("memory MiB", mib)]
    cuda_bytes: Annotated[float | None, Column("CUDA allocated MiB", mib)]
    tmpfs_bytes: Annotated[float, Column("tmpfs MiB", mib)]


class SlopeRow(Row):
    """Least-squares lines through the tenths: changes per 1,000 syncs."""

    rank: Annotated[int, Column("rank")]
    syncs: Annotated[int, Column("syncs")]
    seconds_per_1000: Annotated[float, Column("ms", ms)]
    memory_bytes_per_1000: Annotated[float, Column("memory MiB", mib)]
    cuda_bytes_per_1000: Annotated[float | None, Column("CUDA allocated MiB", mib)]
    tmpfs_bytes_per_1000: Annotated[float, Column("tmpfs MiB", mib)]


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
    notes: list[str] = []  # what a reader must know of this run besides
    sync: list[SyncRow] = Field([], title="Sync: until the engine can sample from the new policy")
    proof: list[ProofRow] = Field([], title="Proofs that are not part of a push")
    truth: list[TruthRow] = Field([], title="Truth: log-probs of the served policy against an fp32 reference")
    memory: list[MemoryRow] = Field([], title="Memory: trainer and engine in one process")
    decode: list[DecodeRow] = Field([], title="Decode: completions of a served policy")
    break_even: list[BreakEvenRow] = Field([], title="Break-even: the completion lengths at which merging is faster")
    fidelity: list[FidelityRow] = Field([], title="Fidelity: what is left of an update")
    drift: list[DriftRow] = Field([], title="Drift: the trainer's frozen base after many syncs")
    step: list[StepRow] = Field([], title="Step: generate, train, sync")
    rollback: list[RollbackRow] = Field([], title="Rollback: back on an earlier version")
    endurance: list[EnduranceRow] = Field([], title="Endurance: many syncs on one engine, a tenth a line")
    slopes: list[SlopeRow] = Field([], title="Endurance: change per 1,000 syncs, by lines through the tenths")


def tables(document: Document) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, field in Document.model_fields.items():
        if field.title and (rows := getattr(document, name)):
            yield field.title, [row.for_people() for row in rows]
