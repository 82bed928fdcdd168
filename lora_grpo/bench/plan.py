"""What is measured where: a subject is a strategy alive in a process, a cell is one piece of measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


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
    subjects = tuple(subject.with_strategy(name) for name in ("native", *others))
    key = f"{part}/{'+'.join(others)}/r{subject.rank}/{subject.targets}"
    return Cell(key, part, work, subjects, order=there_and_back(len(subjects)), **cell)


def there_and_back(subjects: int) -> tuple[int, ...]:
    """An order in which a machine that drifts steadily favours none: 0, 1, 1, 0 for two."""
    return (*range(subjects), *reversed(range(subjects)))


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
