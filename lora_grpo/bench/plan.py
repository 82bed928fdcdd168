"""What is measured where, in which order: a subject is a strategy alive in a process, a cell one piece of measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_grpo.bench.strategies import AGAIN, NATIVE

AT_ONCE = "merge-trl-batched"
BESIDE_NATIVE = ("sync", "decode", "step", "rollback")
"""The tables in which strategies are compared with what native does beside them."""
_ORDER = ("sync", "decode", "rollback", "proof", "fidelity", "drift", "step", "endurance", "truth", "memory")
"""Of what is measured on one engine: memory, which lets go of the weights, last."""


@dataclass(frozen=True)
class Subject:
    """Everything that decides what a worker process becomes. `model` is a directory or a hub name.

    `kv_cache_bytes` fixes the KV cache on a GPU. `rows` are the batch sizes that graphs alone are captured for.
    """

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
    kv_cache_bytes: int | None = None
    seed: int = 0

    def with_strategy(self, name: str) -> Subject:
        return replace(self, strategy=name)

    @property
    def target_modules(self) -> Any:
        """What `peft.LoraConfig` takes."""
        if self.targets == "all-linear":
            return self.targets
        return ("q_proj+k_proj+v_proj+o_proj" if self.targets == "attention" else self.targets).split("+")

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
    """One piece of measuring: `work` is done by `subjects` in the given order of their indices.

    (0, 1, 1, 0) has a drifting machine favour neither. `warm` arguments, if any, are for a round before those, thrown
    away. `table` is where its rows belong, `labels` are columns of them; `name` stands for the strategy's there.
    `fresh` subjects start in new processes and end with the cell; others may live on into the next.
    """

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
    """What `part` measures of `native` and others, there and back."""
    subjects = tuple(subject.with_strategy(name) for name in (NATIVE, *others))
    key = f"{part}/{'+'.join(others)}/r{subject.rank}/{subject.targets}"
    return Cell(key, part, work, subjects, order=there_and_back(len(subjects)), **cell)


def there_and_back(subjects: int) -> tuple[int, ...]:
    """0, 1, 1, 0 for two."""
    return (*range(subjects), *reversed(range(subjects)))


def by_strategy(cells: Sequence[Cell]) -> list[Cell]:
    """All parts of one strategy after another, so that it starts once; what needs fresh processes comes last."""
    first: dict[Subject, int] = {}
    for place, cell in enumerate(cells):
        first.setdefault(cell.subjects[-1], place)
    return sorted(cells, key=lambda cell: (cell.fresh, first[cell.subjects[-1]]))


def one_at_a_time(cells: Sequence[Cell]) -> list[Cell]:
    """The same measurements with one strategy alive at a time, on one engine each; native first, and what others are
    compared with once more when all are done."""
    made: dict[str, Cell] = {}
    for cell in cells:
        for index, subject in enumerate(cell.subjects):
            alone = _alone(cell, index, subject)
            made.setdefault(alone.key, alone)
    alones = list(made.values())
    main = next((cell.subjects for cell in alones if cell.subjects[0].strategy == NATIVE), None)
    # The merge that is compared most, its weights handed over in one call, on the same engine.
    alones += [
        replace(cell, key=f"{cell.key}/at once", name=AT_ONCE, arguments={**cell.arguments, "at_once": True})
        for cell in alones
        if cell.key.startswith("sync/merge-trl/")
    ]
    alones += [
        replace(cell, key=f"{cell.key}/again", subjects=(cell.subjects[0].with_strategy(AGAIN),))
        for cell in alones
        if cell.subjects == main and cell.table in (*BESIDE_NATIVE, "memory")
    ]
    turns = list(dict.fromkeys(cell.subjects for cell in alones))
    turns.sort(key=lambda subjects: subjects[0].strategy != NATIVE)
    return sorted(alones, key=lambda cell: (turns.index(cell.subjects), _ORDER.index(cell.table)))


def _alone(cell: Cell, index: int, subject: Subject) -> Cell:
    key = f"{cell.table}/{subject.strategy}/r{subject.rank}/{subject.targets}/{subject.graphs}"
    return replace(cell, key=key, subjects=(subject,), order=(0,) * cell.order.count(index), fresh=False)


def compared(cells: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was measured, ready for rows: rounds of one strategy in turn stand behind those of native, or where those
    are missing, of its second turn."""
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
