"""The seam between the trainer and whatever makes completions, and the books that each engine keeps of its versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeGuard, TypeVar, runtime_checkable

import torch

from lora_grpo.adapters.version import AdapterVersion, parse_target
from lora_grpo.errors import ConfigError, DeliveryError, UnknownVersion
from lora_grpo.types import Group, LogProbs, Prompt, Sampling, Sequences

if TYPE_CHECKING:
    from lora_grpo.adapters.peft_form.serving import Held
    from lora_grpo.engines.names import BaseReading

_Loaded = TypeVar("_Loaded", bound=Any)

Proof: TypeAlias = Literal["slots", "behaviour", "none"]
"""What a load was proven by: the slot contents, log-probs over a wire, or nothing (a fake)."""

Adapters: TypeAlias = AdapterVersion | Sequence[AdapterVersion | None] | None
"""One version for all prompts, or one a prompt; None is the base model."""
Samplings: TypeAlias = Sampling | Sequence[Sampling]
"""One for all prompts, or one a prompt, whose `first_prompt` is then what that prompt counts as."""


@dataclass(frozen=True, slots=True)
class LoadReceipt:
    """How `Engine.load` proved a version; seconds by phase, bytes of adapter compared. Its `loader` was "direct", from
    memory or the mapped file, or the engine's own ("stock"). `verdict` is a proof by behaviour's: whether log-probs
    could tell the version from every other ("ok") or not."""

    proof: Proof
    seconds: dict[str, float]
    modules: int
    proven_bytes: int
    loader: Literal["direct", "stock"] = "stock"
    verdict: Literal["ok", "inconclusive"] | None = None


@dataclass(frozen=True, slots=True)
class BaseDescription:
    """What an engine's base model is by its config, of which `shapes` are fields; `dtype` is a torch dtype's name
    without the prefix. `placeholders` are tokens of the vocabulary that stand for images, videos or sounds."""

    dtype: str
    shapes: dict[str, float]
    vocabulary: int
    placeholders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Witness:
    """Log-probs that a trainer computes of the probe's sequences without an adapter (`base`) and with the loud one,
    which moves them by `signal` nats per token. A server's base may differ by `most_noise` nats, and rounding errors
    weigh `growth` times as much with the loud adapter as without."""

    base: LogProbs
    loud: LogProbs
    signal: float
    most_noise: float
    growth: float = 1.0

    def most_error(self, noise: float) -> float:
        """Nats by which an engine with the probe may differ, where its base differs by `noise`: a tenth of the signal
        (a scale wrong by 2 differs by half of it), and twice the noise under the adapter, up to as much again."""
        share = 0.1 * self.signal
        return share + min(2.0 * self.growth * noise, share)


@runtime_checkable
class Engine(Protocol):
    """Serves adapter versions, which never change. Use it from one thread. There is no 'current' version."""

    @property
    def proof(self) -> Proof: ...

    @property
    def device(self) -> torch.device | None:
        """The device that it computes on, if it is in this process; else None."""

    @property
    def max_lora_rank(self) -> int: ...

    @property
    def lora_dtype(self) -> str:
        """The dtype it keeps adapters in, as a torch dtype's name without the prefix."""

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> LoadReceipt:
        """Load and prove `version`. If that fails, earlier versions are still served, and nothing of `version`.

        `held` are its tensors, if the caller has them in memory, so that they need not be read from disk. If it is
        loaded already, it is proven again. Raises `DeliveryError` or `EngineError`.
        """

    def unload(self, version: AdapterVersion) -> None:
        """Forget `version`. Raises `UnknownVersion` when it is not loaded."""

    def loaded(self) -> tuple[AdapterVersion, ...]:
        """The versions that can be sampled from, least recently used first."""

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        """One group for each prompt, in order; each completion has the number of the version that made it.

        `adapter` is the version for all prompts, or a list with one for each; None is the base. `sampling` is also one
        for all, or one for each. The result for a prompt does not depend on the other prompts. Raises `UnknownVersion`
        for a version that is not loaded, and `EngineError` after cleaning up.
        """

    def logprobs(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> LogProbs:
        """Teacher-forced log-probs at temperature 1 of tokens 1..T-1 of each sequence."""

    def describe_base(self) -> BaseDescription: ...

    def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        """Digests of the base's tensors that `shapes` names (by the checkpoint's names), one reading for each process
        that answers, even if it can read nothing. Empty if there is no base (a fake)."""

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""


def is_remote(engine: Engine) -> TypeGuard[Any]:
    """Whether it is of servers, which cannot be looked into: `load` is told what the trainer computes (`expected`)."""
    return engine.proof == "behaviour"


def require_version(given: object) -> AdapterVersion:
    """`given`; raises `ConfigError` for a number: an engine may serve versions of several stores."""
    if isinstance(given, AdapterVersion):
        return given
    named = parse_target(given)
    said = f"an engine takes an AdapterVersion, but {given!r} names one in a store: pass store.get({named!r})"
    raise ConfigError(f"{said} (sync.store.get({named!r}), trainer.store.get({named!r})); None is the base model")


class LoadedVersions(Generic[_Loaded]):
    """What an engine has of each version (its `version`), by path, least recently used first."""

    def __init__(self) -> None:
        # Replaced and never changed: who reads it in another thread has one state of it, and misses no version.
        self._by_path: dict[Path, _Loaded] = {}

    def all(self) -> tuple[_Loaded, ...]:
        return tuple(self._by_path.values())

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        return tuple(loaded.version for loaded in self.all())

    def find(self, version: AdapterVersion) -> _Loaded:
        """Raises `UnknownVersion` for one that is not loaded."""
        found = self._by_path.get(require_version(version).path)
        if found is None or found.version.digest != version.digest:
            held = ", ".join(map(str, self.versions)) or "none"
            raise UnknownVersion(f"{version} is not loaded (loaded: {held}); call engine.load(version) first")
        return found

    def known(self, version: AdapterVersion) -> _Loaded | None:
        """None for one that is not loaded. Raises `DeliveryError` where its path was loaded with other bytes."""
        known = self._by_path.get(require_version(version).path)
        if known is not None and known.version.digest != version.digest:
            raise DeliveryError(f"{version.path} is loaded as {known.version} with other bytes; a path must not change")
        return known

    def add(self, loaded: _Loaded) -> None:
        """As the most recently used; one that is there already becomes it."""
        path = loaded.version.path
        self._by_path = {**{other: known for other, known in self._by_path.items() if other != path}, path: loaded}

    def remove(self, loaded: _Loaded) -> None:
        """Where it is there: another load of the same version, which failed, takes nothing away."""
        self._by_path = {path: known for path, known in self._by_path.items() if known is not loaded}
