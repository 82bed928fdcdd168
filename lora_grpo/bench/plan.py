"""What is asked of the suite, by options or a TOML file, and what is measured where, in which order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from pydantic import Field, model_validator

from lora_grpo.bench.shapes import shape_config
from lora_grpo.config_file import read_settings
from lora_grpo.errors import ConfigError
from lora_grpo.sections import Section, nearest_key

NATIVE, SHARED, STOCK, BASE = "native", "native-shared", "native-stock", "base"
AGAIN, AT_ONCE = "native again", "merge-trl-batched"
_CLASSES = {
    NATIVE: "Native",
    AGAIN: "Native",
    "native-disk": "NativeDisk",
    SHARED: "NativeShared",
    STOCK: "NativeStock",
    "by-hand": "ByHand",
    "merge-trl": "MergeTRL",
    "merge-touched": "MergeTouched",
    "merge-out-of-place": "MergeOutOfPlace",
    "merge-fold": "MergeFold",
    BASE: "BaseOnly",
}
STRATEGIES = ("native", "native-disk", "by-hand", "merge-trl", "merge-touched", "merge-out-of-place", "merge-fold")
"""What is compared; the others differ from one of these in what they hold or compute with, not in their syncs."""
BESIDE_NATIVE = ("sync", "decode", "step", "rollback")
"""The tables in which strategies are compared with what native does beside them."""
TABLES = ("sync", "decode", "rollback", "proof", "fidelity", "drift", "step", "endurance", "truth", "memory")
"""What is measured, in the order on one engine: memory, which lets go of the weights, last."""
_DEFAULTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "sync": (20, STRATEGIES),
    "memory": (1, (*STRATEGIES, "native-shared")),
    "decode": (2, ("base", "native", "native-stock", "native-shared", "merge-trl", "merge-fold")),
    "fidelity": (1, ("native", "by-hand", "merge-trl", "merge-out-of-place", "merge-fold")),
    "step": (2, ("native", "merge-trl", "merge-fold")),
    "rollback": (6, ("native", "by-hand", "merge-trl", "merge-fold")),
    "endurance": (1, ("native",)),
}
"""`repeat` and `strategies` of each part, in the order in which `all` makes them."""
PARTS = tuple(_DEFAULTS)


class Settings(Section):
    """How one part is measured."""

    shape: str | None = Field("qwen2.5-0.5b", description="model shape with random weights")
    model: str | None = Field(None, description="hub name or directory, in place of a shape")
    device: str = Field("cpu", description="where trainer and engine are: cpu or cuda:0")
    strategies: tuple[str, ...] = Field((), description="what is compared; native is always measured beside it")
    rank: int = Field(16, ge=1, description="LoRA rank")
    targets: str = Field("all-linear", description="LoRA targets: all-linear, attention or names joined with +")
    repeat: int = Field(ge=1, description="measurements of each strategy")
    seed: int = Field(0, ge=0, description="of weights, adapters and prompts")
    graphs: bool | Literal["alone"] = Field(False, description="CUDA graphs, compiled (slow); alone: not compiled")
    in_turn: bool = Field(False, description="one strategy alive at a time, native first and last; always so on a GPU")
    max_model_len: int = Field(512, ge=16, description="tokens of prompt and completion at most")
    max_num_seqs: int = Field(64, ge=1, description="rows that an engine takes at once")
    truth: bool = Field(True, description="sync, decode: check that what was timed serves the right policy")
    canary_rows: tuple[int, ...] = Field((8, 32), description="sync: completions of a canary whose cost is measured")
    sweep_ranks: tuple[int, ...] = Field((8, 64), description="sync: further ranks")
    sweep_targets: tuple[str, ...] = Field(("attention",), description="sync: further targets")
    sweep_strategies: tuple[str, ...] = Field(("merge-trl",), description="sync: what is swept beside native")
    rows: tuple[int, ...] = Field((1, 8, 32), min_length=1, description="decode: batch sizes")
    prompt_tokens: int = Field(32, ge=1, description="decode, step, canary: tokens a prompt")
    lengths: tuple[int, ...] = Field((16, 48), min_length=1, description="decode: completion tokens")
    least_s: float = Field(1.5, ge=0, description="decode: seconds that each size and length is measured for at least")
    step_rows: int = Field(8, ge=2, description="step: completions a step")
    step_tokens: int = Field(32, ge=1, description="step: tokens a completion")
    group: int = Field(4, ge=2, description="step: completions a prompt")
    learning_rates: tuple[float, ...] = Field((1e-6, 1e-5, 1e-4), description="fidelity: of the update served")
    updates: tuple[int, ...] = Field((1, 100), description="fidelity: optimizer steps that the update stands for")
    cycles: tuple[int, ...] = Field((1, 10, 100, 1000), description="fidelity: syncs after which drift is looked at")
    drift_strategies: tuple[str, ...] = Field(
        ("native", "merge-trl", "merge-out-of-place", "merge-fold"), description="fidelity: whose drift"
    )

    endurance_syncs: int = Field(1000, ge=20, description="endurance: syncs of one engine")

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.step_rows % self.group:
            raise ValueError(f"step_rows={self.step_rows} must be a multiple of group={self.group}")
        longest = self.prompt_tokens + max(*self.lengths, self.step_tokens)
        if longest > self.max_model_len:
            raise ValueError(f"prompt and completion reach {longest} tokens, above max_model_len={self.max_model_len}")
        return self

    @property
    def takes_turns(self) -> bool:
        """Whether one strategy is alive at a time, which makes ratios those of unpaired medians."""
        return self.in_turn or self.device != "cpu"

    @property
    def each_way(self) -> int:
        """Measurements of each strategy there, and as many back."""
        return -(-self.repeat // 2)

    @property
    def others(self) -> list[str]:
        return [name for name in self.strategies if name != NATIVE]

    @property
    def engine(self) -> str:
        """How engines run, in a word for tables: nothing is captured or compiled, graphs alone, or vLLM's default."""
        if self.graphs == "alone" and self.device != "cpu":
            return "graphs alone"
        return "compiled" if self.graphs is True else "eager"

    @property
    def label(self) -> str:
        return self.model or str(self.shape)


def load_strategy(name: str) -> Any:
    """The class; one of your own is named as `package.module:Class`."""
    return resolve_name(f"lora_grpo.bench.strategies:{_CLASSES[name]}" if name in _CLASSES else name)


def plan_parts(part: str, scenario: Path | None, options: Mapping[str, Any]) -> dict[str, Settings]:
    """Settings by part, in order; `options` win over the file. Raises `ConfigError` for what cannot be."""
    if part != "all" and part not in PARTS:
        raise ConfigError(f"unknown part {part!r}; {nearest_key(part, (*PARTS, 'all'))}")
    tables = {} if scenario is None else read_settings(scenario)
    for name in tables:
        if name not in ("all", *PARTS):
            raise ConfigError(f"{scenario}: unknown table [{name}]; {nearest_key(name, (*PARTS, 'all'))}")
    named = [name for name in PARTS if name in tables] or list(PARTS)
    parts = {}
    for name in named if part == "all" else [part]:
        repeat, strategies = _DEFAULTS[name]
        asked = {"repeat": repeat, "strategies": strategies, **tables.get("all", {}), **tables.get(name, {}), **options}
        parts[name] = made = Settings(**asked)
        for strategy in made.strategies:
            if strategy not in _CLASSES and ":" not in strategy:
                raise ConfigError(f"unknown strategy {strategy!r}; {nearest_key(strategy, _CLASSES)}")
        if made.model is None:
            shape_config(str(made.shape))
    # A sync alone has proofs to measure.
    if part in BESIDE_NATIVE and part != "sync" and not parts[part].others:
        raise ConfigError(f"{part} measures strategies beside {NATIVE}: name another, such as --strategies merge-trl")
    return parts


@dataclass(frozen=True)
class Subject:
    """Everything that decides what a worker process becomes. `rows`: batch sizes that graphs alone are captured for."""

    strategy: str
    model: str
    rank: int
    targets: str
    device: str
    tmpfs: str = ""
    disk: str = ""
    max_model_len: int = 512
    max_num_seqs: int = 64
    graphs: bool | str = False
    gpu_memory_utilization: float = 0.35
    rows: tuple[int, ...] = ()
    kv_cache_memory_bytes: int | None = None
    seed: int = 0

    @property
    def target_modules(self) -> Any:
        names = "q_proj+k_proj+v_proj+o_proj" if self.targets == "attention" else self.targets
        return names if names == "all-linear" else names.split("+")

    def sequences(self) -> list[list[int]]:
        """Fixed random tokens, the same in every process of a model."""
        return self.fresh_prompts(4, 32, seed=self.seed)

    def fresh_prompts(self, rows: int, tokens: int, *, seed: int | None = None) -> list[list[int]]:
        """Random token ids; without a seed, different each time."""
        import torch
        from transformers import AutoConfig

        vocabulary = AutoConfig.from_pretrained(self.model).get_text_config().vocab_size
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.randint(1, vocabulary, (rows, tokens), generator=generator).tolist()


@dataclass(frozen=True)
class Cell:
    """`work`, done by `subjects` in the order of their indices: (0, 1, 1, 0) has a drifting machine favour neither.
    `warm` arguments are for a round before, thrown away. Rows of it belong to `table`, with `labels` as columns and
    `name` in the strategy's place. `fresh` subjects start in new processes and end with the cell."""

    key: str
    table: str
    work: Callable[..., Any]
    subjects: tuple[Subject, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    order: tuple[int, ...] = (0,)
    warm: dict[str, Any] | None = None
    fresh: bool = False
    labels: dict[str, Any] = field(default_factory=dict)
    name: str | None = None


def beside_native(part: str, work: Callable[..., Any], subject: Subject, *others: str, **cell: Any) -> Cell:
    """What `part` measures of `native` and others, there and back: in the order 0, 1, 1, 0 for two."""
    subjects = tuple(replace(subject, strategy=name) for name in (NATIVE, *others))
    order = (*range(len(subjects)), *reversed(range(len(subjects))))
    key = f"{part}/{'+'.join(others)}/r{subject.rank}/{subject.targets}"
    return Cell(key, part, work, subjects, order=order, **cell)


def alone(key: str, table: str, work: Callable[..., Any], subject: Subject, strategy: str, **cell: Any) -> Cell:
    return Cell(f"{key}/{strategy}", table, work, (replace(subject, strategy=strategy),), **cell)


def by_strategy(cells: Sequence[Cell]) -> list[Cell]:
    """All parts of one strategy after another, so that it starts once; what needs fresh processes comes last."""
    turns = list(dict.fromkeys(cell.subjects[-1] for cell in cells))
    return sorted(cells, key=lambda cell: (cell.fresh, turns.index(cell.subjects[-1])))


def one_at_a_time(cells: Sequence[Cell]) -> list[Cell]:
    """The same with one strategy alive at a time, on one engine each; native first, and once more when all are done."""
    made: dict[str, Cell] = {}
    for cell in cells:
        for index, subject in enumerate(cell.subjects):
            key = f"{cell.table}/{subject.strategy}/r{subject.rank}/{subject.targets}/{subject.graphs}"
            order = (0,) * cell.order.count(index)
            made.setdefault(key, replace(cell, key=key, subjects=(subject,), order=order, fresh=False))
    alones = list(made.values())
    main = next((cell.subjects for cell in alones if cell.subjects[0].strategy == NATIVE), None)
    # The merge that is compared most, its weights handed over in one call, on the same engine.
    alones += [
        replace(cell, key=f"{cell.key}/at once", name=AT_ONCE, arguments={**cell.arguments, "at_once": True})
        for cell in alones
        if cell.key.startswith("sync/merge-trl/")
    ]
    alones += [
        replace(cell, key=f"{cell.key}/again", subjects=(replace(cell.subjects[0], strategy=AGAIN),))
        for cell in alones
        if cell.subjects == main and cell.table in (*BESIDE_NATIVE, "memory")
    ]
    turns = sorted(dict.fromkeys(cell.subjects for cell in alones), key=lambda turn: turn[0].strategy != NATIVE)
    return sorted(alones, key=lambda cell: (turns.index(cell.subjects), TABLES.index(cell.table)))


def compared(cells: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Cells ready for rows: rounds of one strategy in turn stand behind native's, else behind its second turn's."""
    for cell in cells.values():
        rounds, kind = cell["rounds"], (cell["table"], cell["labels"])
        if cell["table"] not in BESIDE_NATIVE or len(results(cell)) > 1:
            yield cell
            continue
        alike = [one["rounds"] for one in cells.values() if (one["table"], one["labels"]) == kind]
        of = {found[0]["strategy"]: found for found in alike}
        native = of.get(NATIVE, of.get(AGAIN, rounds))
        yield {**cell, "rounds": rounds if native is rounds else [*native, *rounds], "unpaired": True}


def results(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What the rounds of each strategy returned, as one; the one that others are compared with comes first."""
    found: dict[str, Any] = {}
    for done in cell["rounds"]:
        name, result = done["strategy"], done["result"]
        found[name] = _pooled(found[name], result) if name in found else result
    return found


def _pooled(earlier: Any, later: Any) -> Any:
    """Two rounds as one: lists one after the other, field by field; of what is no list, the later one's."""
    if isinstance(earlier, dict):
        return {name: _pooled(value, later[name]) for name, value in earlier.items()}
    return earlier + later if isinstance(earlier, list) else later
