"""The seam: what a strategy, with its trainer, is to the measurements; and what it takes of memory, measured here:
what a file of its own imported would count as the syncs'."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lora_grpo.adapters.peft_form.modules import LoraModule, lora_modules
from lora_grpo.bench.gauges import Levels, forget_peaks, mapped, on_tmpfs, peak, settled_level
from lora_grpo.bench.plan import Cell, Settings, Subject, alone
from lora_grpo.engines.local.weights import drop_weights, lora_tensors
from lora_grpo.types import Group, Sampling

ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Synced:
    """One sync: by phase until the engine can sample from the new policy, and by channel of `measure_bandwidth`."""

    seconds: dict[str, float]
    moved_bytes: dict[str, int]
    afterwards_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class Trainer:
    """The trainer's side, the same for every strategy: a frozen bf16 base (its own copy unless one is given) and
    an fp32 adapter with alpha = 2r. What training would do to the adapter is done to it by random signs."""

    def __init__(self, subject: Subject, base: Any = None) -> None:
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(subject.model, dtype=torch.bfloat16).to(subject.device)
            for parameter in base.parameters():
                # On the CPU they are views of the mapped file, whose pages count when they are first touched.
                parameter.data = parameter.data.clone()
        torch.manual_seed(subject.seed)
        config = LoraConfig(r=subject.rank, lora_alpha=2 * subject.rank, target_modules=subject.target_modules)
        self.model: PeftModel = get_peft_model(base, config, autocast_adapter_dtype=True)
        self.modules: list[LoraModule] = lora_modules(self.model, ADAPTER)
        self._generator = torch.Generator(subject.device).manual_seed(subject.seed)

    def step(self, learning_rate: float = 1e-5) -> None:
        """Move every entry of A and B by the learning rate, up or down: what AdamW does to them at first."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.add_(self._signs(tensor), alpha=learning_rate)

    def nudge(self, size: float = 1e-5) -> None:
        """Move every entry by the same: a change that takes next to no time."""
        with torch.no_grad():
            torch._foreach_add_(self.tensors(), size)

    def reset(self, b_size: float) -> None:
        """A as PEFT draws it, every entry of B at plus or minus `b_size`."""
        with torch.no_grad():
            for module in self.modules:
                nn.init.kaiming_uniform_(module.a_RI, a=5**0.5)
                module.b_OR.copy_(self._signs(module.b_OR) * b_size)

    def randomise(self, size: float, seed: int | None = None) -> None:
        """A with unit gain on its input; B normal, so that B A x is of order `size` after scaling. With a seed, the
        same on every trainer of a model."""
        if seed is not None:
            self._generator.manual_seed(seed)
        with torch.no_grad():
            for module in self.modules:
                a, b = module.a_RI, module.b_OR
                a.normal_(generator=self._generator).div_(a.shape[1] ** 0.5)
                b.normal_(generator=self._generator).mul_(size).div_(module.scaling * b.shape[1] ** 0.5)

    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.tensors(), snapshot)

    def tensors(self) -> list[torch.Tensor]:
        """A, B, A, B, ... by module."""
        return [tensor for module in self.modules for tensor in (module.a_RI, module.b_OR)]

    @property
    def adapter_elements(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    def base_weight(self, module: LoraModule) -> torch.Tensor:
        return module.layer.get_base_layer().weight.detach()

    def update_of(self, module: LoraModule) -> torch.Tensor:
        """s B A in fp32: what the adapter adds to the weight."""
        return module.scaling * (module.b_OR.detach().float() @ module.a_RI.detach().float())

    @property
    def base_bytes(self) -> int:
        """Bytes of one copy of the base; tied weights count once."""
        return sum(parameter.nbytes for name, parameter in self.model.named_parameters() if "lora_" not in name)

    def drop_base(self) -> None:
        """Let go of the base's weights; the model cannot be used afterwards."""
        for name, module in self.model.named_modules():
            if "lora_" not in name:
                module._parameters.clear()

    def _signs(self, like: torch.Tensor) -> torch.Tensor:
        bits = torch.randint(0, 2, like.shape, generator=self._generator, device=like.device)
        return bits.to(like.dtype).mul_(2).sub_(1)


class Strategy(ABC):
    trainer: Trainer
    engine: Any
    rollback_cases: ClassVar[dict[str, int]]  # ways back that differ in cost -> syncs in between that bring one about
    loader: str | None = None
    load_calls: int | None = None
    version: Any = None
    at_once: bool = False
    remember_pushed: bool = False  # so that `served_weight` can tell what a sync pushed; costs memory and time

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.levels = Levels(subject.device)
        self.load()
        self.base_logprobs = self.logprobs(subject.sequences())

    def load(self) -> None:
        self.trainer = Trainer(self.subject)
        self.levels.seen("trainer")
        self.start()
        self.levels.seen("engine")

    @abstractmethod
    def start(self) -> None:
        """Start the engine on `self.subject`, for `self.trainer`."""

    @abstractmethod
    def sync(self) -> Synced:
        """Have the engine serve the trainer's policy as it is now."""

    def renew(self) -> Synced:
        self.trainer.step()
        return self.sync()

    def same_bits(self) -> bool | None:
        """Whether a trainer on shared weights sees the checkpoint's, bit for bit; None where it has its own."""
        return None

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs of what is served; of the base before the first sync."""
        return self.engine.logprobs(sequences, **self.served())

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Group]:
        return self.engine.generate(prompts, sampling, **self.served())

    def served(self) -> dict[str, Any]:
        """How the engine is told whom to sample from; a stock one serves what it was given last."""
        return {}

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        """The fp32 weight computed with at `path` (here, beside LoRA), given the base's; needs `remember_pushed`."""
        a_RI, b_OR = lora_tensors(self.engine, path, self.version)
        return base_OI + (b_OR.float() @ a_RI.float()).to(base_OI.device)

    def close(self) -> None:
        self.engine.close()

    def drop_base(self) -> None:
        """Let go of every weight of the base, to see what they took; neither side can be used afterwards."""
        self.trainer.drop_base()
        drop_weights(self.engine)

    @abstractmethod
    def mark(self) -> Any:
        """What `rollback` needs to come back to what was synced last."""

    @abstractmethod
    def rollback(self, mark: Any) -> Synced:
        """Have engine and trainer back on what was marked."""

    @property
    def folder(self) -> Path:
        """For the strategy's own files; no other process's."""
        return Path(self.subject.tmpfs, str(os.getpid()))


def engine_arguments(subject: Subject) -> dict[str, Any]:
    names = ("max_model_len", "max_num_seqs", "gpu_memory_utilization", "kv_cache_memory_bytes")
    arguments: dict[str, Any] = {name: getattr(subject, name) for name in names}
    if subject.graphs != "alone" or subject.device == "cpu":
        # Nothing captured, or vLLM's default: compiled, graphs of many sizes.
        return {**arguments, "enforce_eager": subject.graphs is not True}
    # Graphs of whole decode steps of the rows that are measured.
    captured = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted({*subject.rows})}
    return {**arguments, "enforce_eager": False, "compilation_config": captured}


def checkpoint_name(name: str) -> str:
    """A parameter of a PEFT model's base as the checkpoint names it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def memory_cells(settings: Settings, subject: Subject) -> list[Cell]:
    return [alone("memory", "memory", measure_memory, subject, name, fresh=True) for name in settings.strategies]


def measure_memory(strategy: Strategy, syncs: int = 5) -> list[dict[str, Any]]:
    """Worker: the levels on the way here, the peak over some syncs, and what the weights took, which are gone then."""
    device, levels = strategy.subject.device, strategy.levels
    forget_peaks(device)
    for _ in range(syncs):
        strategy.renew()
    most, reserved = peak(device)
    copy_bytes = strategy.trainer.base_bytes
    tmpfs = on_tmpfs(strategy.folder)
    # On the CPU the peak counts mapped version files; here they count once, as tmpfs.
    most -= mapped(strategy.folder) if device == "cpu" else 0
    before = settled_level(device)
    strategy.drop_base()
    row = {
        "kind": "resident" if device == "cpu" else "cuda",
        "before_bytes": levels.start,
        "trainer_bytes": levels.grown["trainer"],
        "engine_bytes": levels.grown["engine"],
        "sync_bytes": max(0, most - levels.last),
        "tmpfs_bytes": tmpfs,
        "peak_bytes": most - levels.start + tmpfs,
        "reserved_peak_bytes": reserved,
        "copy_bytes": copy_bytes,
        "weights_bytes": before - settled_level(device),
    }
    return [row]
