"""The seam between the trainer and whatever makes completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.types import Group, LogProbs, Prompt, Sampling, Sequences

if TYPE_CHECKING:
    from lora_grpo.adapters.peft_form.serving import Held
    from lora_grpo.engines.delivery.canary import Witness
    from lora_grpo.engines.names import BaseReading

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


class RemoteEngine(Engine, Protocol):
    """An engine of one or many servers, none of which can be looked into: it is told what the trainer computes, and
    compares what they answer. Its `proof` is "behaviour"."""

    @property
    def pulls(self) -> bool:
        """Whether servers pull versions from the store, so that a version has to be in it to be loaded."""

    def load(
        self, version: AdapterVersion, *, held: Held | None = None, expected: LogProbs | None = None
    ) -> LoadReceipt:
        """`Engine.load` on every server or on none; `expected` are the trainer's log-probs of `probe_sequences`."""

    def logprobs_of_each(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> list[LogProbs]:
        """`logprobs` of each server in use."""

    def keep_probe(self, version: AdapterVersion, witness: Witness, noise: float) -> None:
        """Prove every server that restarts with a copy of this probe; `noise` is the servers' on the base, nats."""


def is_remote(engine: Engine) -> TypeGuard[RemoteEngine]:
    return engine.proof == "behaviour"
