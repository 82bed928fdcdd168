"""The ways to serve merged weights: pushed through vLLM's loaders, or folded into the engine's own; and the base."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar, TypeAlias

import torch

from lora_grpo.bench.gauges import Clock, weights_crossing
from lora_grpo.bench.strategies.base import Strategy, Synced, checkpoint_name, engine_arguments
from lora_grpo.engines.local.weights import PlainEngine

Named: TypeAlias = Iterator[tuple[str, torch.Tensor]]
Phases: TypeAlias = dict[str, Callable[[], object]]


class Merging(Strategy):
    """The engine runs with `enable_lora=False`, its real best for merged weights."""

    rollback_cases: ClassVar[dict[str, int]] = {"merged again": 1}
    prepack = True
    moved_bytes = 0  # of weights, in the last sync

    def start(self) -> None:
        self.engine = PlainEngine(self.subject.model, prepack=self.prepack, **engine_arguments(self.subject))

    def mark(self) -> list[torch.Tensor]:
        return self.trainer.snapshot()

    def rollback(self, mark: list[torch.Tensor]) -> Synced:
        return self._go_through({"trainer": partial(self.trainer.restore, mark), **self.phases()})

    def sync(self) -> Synced:
        return self._go_through(self.phases())

    def phases(self) -> Phases:
        """What a sync does, before what the prefix cache holds is dropped."""
        return {}

    def _go_through(self, phases: Phases) -> Synced:
        clock = Clock(self.subject.device)
        for phase, work in {**phases, "cache reset": self.engine.reset_prefix_cache}.items():
            with clock(phase):
                work()
        return Synced(clock.seconds, weights_crossing(self.subject.device, self.moved_bytes))


class BaseOnly(Merging):
    """The base on an engine without LoRA: what decoding costs at best. There is no trainer, and nothing to push."""

    def load(self) -> None:
        self.start()
        self.levels.seen("engine")

    def renew(self) -> Synced:
        return self.sync()

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        return base_OI


class MergeTRL(Merging):
    """What TRL's GRPOTrainer does: merge in place, push every weight under its checkpoint name, unmerge. One tensor at
    a time, or all `at_once`; on the CPU, whose prepacked weights want it so, all through `reload_weights`."""

    def start(self) -> None:
        super().start()
        self._pushed: dict[str, torch.Tensor] = {}

    def phases(self) -> Phases:
        model = self.trainer.model
        return {"merge": model.merge_adapter, "push": self.push, "unmerge": model.unmerge_adapter}

    def push(self) -> None:
        self.moved_bytes = 0
        self._pushed.clear()
        self.load_calls = self.engine.load_weights(self._counted(), at_once=self.at_once)

    def weights(self) -> Named:
        """The base's parameters by checkpoint name, as they are now."""
        for name, parameter in self.trainer.model.named_parameters():
            if ".lora_" not in name:
                yield checkpoint_name(name), parameter.data

    def _counted(self) -> Named:
        for name, tensor in self.weights():
            self.moved_bytes += tensor.nbytes
            if self.remember_pushed:
                self._pushed[name] = tensor.clone()
            yield name, tensor

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        return self._pushed[f"{path}.weight"].float()


class MergeTouched(MergeTRL):
    """As TRL merges, but only what LoRA touches is pushed, with every member of a touched fused layer, biases too: a
    part of it would silently corrupt the rest."""

    def start(self) -> None:
        super().start()
        layers = {self.engine.layer_of(module.path) for module in self.trainer.modules}
        names = [name for name, _ in super().weights()]
        self._touched = {name for name in names if self.engine.layer_of(name.rpartition(".")[0]) in layers}

    def weights(self) -> Named:
        return ((name, tensor) for name, tensor in super().weights() if name in self._touched)


class MergeOutOfPlace(MergeTouched):
    """W + s B A made tensor by tensor while streaming, in fp32, rounded once; the trainer's base is not written to."""

    def start(self) -> None:
        super().start()
        self._module_of = {f"{module.path}.weight": module for module in self.trainer.modules}

    def phases(self) -> Phases:
        return {"push": self.push}

    @torch.no_grad()
    def weights(self) -> Named:
        for name, tensor in super().weights():
            module = self._module_of.get(name)
            yield name, tensor if module is None else (tensor + self.trainer.update_of(module)).to(tensor.dtype)


class MergeFold(Merging):
    """The strongest merge there can be: A and B alone travel, and W0 + s B A, from a pristine W0, goes straight into
    the (fused) weights that the engine computes with. No renaming, no unmerging, no drift; but a second copy of the
    base, and the bf16 grid. On the CPU weights can only be written to unprepacked, which it computes slower with."""

    prepack = False

    def start(self) -> None:
        super().start()
        weight = self.engine.linear_weight
        self._folds = [(module, weight(module.path, module.layer.weight.shape)) for module in self.trainer.modules]
        self._pristine = [weight.clone() for _, weight in self._folds]
        # Trainer and engine share the device: A and B cross its memory once.
        self.moved_bytes = 2 * self.trainer.adapter_elements

    def phases(self) -> Phases:
        return {"merge": self.fold}

    @torch.no_grad()
    def fold(self) -> None:
        for (module, weight), pristine in zip(self._folds, self._pristine, strict=True):
            a_RI, b_OR = module.a_RI.to(weight.dtype), (module.b_OR * module.scaling).to(weight.dtype)
            torch.addmm(pristine, b_OR, a_RI, out=weight)

    def drop_base(self) -> None:
        self._folds.clear()
        self._pristine.clear()
        super().drop_base()

    def served_weight(self, path: str, base_OI: torch.Tensor) -> torch.Tensor:
        return next(weight for module, weight in self._folds if module.path == path).float()
