"""What the merge strategies share: an engine without LoRA, and weights that are pushed into it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch

from lora_grpo.bench.strategies.base import Strategy, Synced, engine_arguments
from lora_grpo.bench.timing import Clock
from lora_grpo.engines.local.dropping import drop_weights
from lora_grpo.engines.local.weights import PlainEngine
from lora_grpo.types import Group, Sampling

LORA = ".lora_"


class Merging(Strategy):
    """The engine runs with `enable_lora=False`, its real best for merged weights."""

    prepack = True

    def start(self) -> None:
        self.engine = PlainEngine(self.subject.model, prepack=self.prepack, **engine_arguments(self.subject))
        self._pushed: dict[str, torch.Tensor] = {}
        self._moved = 0

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.engine.logprobs(sequences)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Group]:
        return self.engine.generate(prompts, sampling)

    @property
    def kv_tokens(self) -> int:
        return self.engine.kv_tokens

    def rollback_cases(self) -> dict[str, int]:
        return {"merged again": 1}

    def mark(self) -> list[torch.Tensor]:
        return self.trainer.snapshot()

    def rollback(self, mark: list[torch.Tensor]) -> Synced:
        clock = Clock(self.subject.device)
        with clock("trainer"):
            self.trainer.restore(mark)
        synced = self.sync()
        return Synced({**clock.seconds, **synced.seconds}, synced.moved_bytes, synced.afterwards_s)

    def drop_base(self) -> None:
        self.trainer.drop_base()
        drop_weights(self.engine)

    def close(self) -> None:
        self.engine.close()

    @property
    def channel(self) -> str:
        """What weights cross: trainer and engine are on one device."""
        return "host_copy" if self.subject.device == "cpu" else "device_copy"


class Pushing(Merging):
    """Whole weights in checkpoint form are pushed through vLLM's loaders, one by one or `at_once`."""

    at_once = False

    def push(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._moved = 0
        self._pushed.clear()
        self.load_calls = self.engine.load_weights(self._counted(named), at_once=self.at_once)

    def _counted(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named:
            self._moved += tensor.numel() * tensor.element_size()
            if self.remember_pushed:
                self._pushed[name] = tensor.clone()
            yield name, tensor

    def touched(self) -> set[str]:
        """Checkpoint paths of the layers that must be pushed when those that LoRA touches are: whole fused groups."""
        return {member for module in self.trainer.modules for member in self.engine.fused_with(module.path)}

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        return self._pushed[f"{path}.weight"].float()

    @property
    def moved_bytes(self) -> dict[str, int]:
        return {self.channel: self._moved}

    @abstractmethod
    def sync(self) -> Synced: ...


def checkpoint_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A PEFT model's base under its checkpoint names, as it is now."""
    for name, parameter in model.named_parameters():
        if LORA not in name:
            yield checkpoint_name(name), parameter.data


def checkpoint_name(name: str) -> str:
    """A parameter of a PEFT model's base as the checkpoint names it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
