"""The ways to serve a policy: the adapter alone, by this project's path or by hand; or weights merged, as nowhere else
in this package, and pushed through vLLM's loaders or folded into the engine's own."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_latest
from lora_grpo.bench.gauges import Clock, adapter_crossing, weights_crossing
from lora_grpo.bench.strategy import Strategy, Synced, Trainer, checkpoint_name, engine_arguments
from lora_grpo.engines.local.weights import PlainEngine
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.sync import NativeSync

Named: TypeAlias = Iterator[tuple[str, torch.Tensor]]
Phases: TypeAlias = dict[str, Callable[[], object]]
KEPT_VERSIONS = 8


class Native(Strategy):
    """`NativeSync.push`, as a user calls it."""

    rollback_cases: ClassVar[dict[str, int]] = {"still loaded": 1, "evicted": KEPT_VERSIONS - 2}
    engine_options: ClassVar[dict[str, Any]] = {}

    def start(self) -> None:
        self.start_engine()
        self.connect()

    def start_engine(self) -> None:
        targets = None if self.subject.targets == "all-linear" else self.subject.target_modules
        options = {"max_lora_rank": self.subject.rank, **self.engine_options, **engine_arguments(self.subject)}
        self.engine = VLLMEngine(self.subject.model, target_modules=targets, **options)

    def connect(self) -> None:
        self.store = AdapterStore(self.folder, retention=keep_latest(KEPT_VERSIONS))
        self.pusher = NativeSync(self.trainer.model, self.engine, self.store)

    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        with clock("push"):
            self.version = self.pusher.push(step=0)
        receipt = self.pusher.last_receipt
        assert receipt is not None
        self.loader = receipt.load.loader
        device_s = max(0.0, clock.seconds["push"] - receipt.total_s - receipt.keeping_s)
        crossing = adapter_crossing(self.subject.device, self.pusher.adapter_bytes)
        return Synced({**receipt.seconds, "device": device_s}, crossing, receipt.keeping_s)

    def served(self) -> dict[str, Any]:
        return {"adapter": self.version}

    def mark(self) -> int:
        return self.version.number

    def rollback(self, mark: int) -> Synced:
        clock = Clock(self.subject.device)
        with clock("rollback"):
            self.version = self.pusher.rollback(to=mark).version
        return Synced(clock.seconds, {})

    def close(self) -> None:
        self.pusher.close()
        super().close()
        self.store.close()


class NativeDisk(Native):
    """As `Native`, with its versions on an ordinary disk: what tmpfs is worth."""

    def start(self) -> None:
        with warnings.catch_warnings(action="ignore"):
            super().start()

    @property
    def folder(self) -> Path:
        return Path(self.subject.disk, str(os.getpid()))


class NativeStock(Native):
    """As `Native`, decoding on vLLM's own CPU LoRA kernels: what ours are worth."""

    engine_options: ClassVar[dict[str, Any]] = {"cpu_lora_kernels": False}


class NativeShared(Native):
    """As `Native`, on one copy of the base: views into the engine's weights, which on the CPU are not prepacked."""

    engine_options: ClassVar[dict[str, Any]] = {"share_base_weights": True}

    def load(self) -> None:
        self.start_engine()
        self.levels.seen("engine")
        self.trainer = Trainer(self.subject, self.engine.shared_model())
        self.levels.seen("trainer")
        self.connect()
        self.levels.seen("engine")

    def same_bits(self) -> bool | None:
        from safetensors.torch import load_file

        own = {checkpoint_name(name): parameter.detach() for name, parameter in self.trainer.model.named_parameters()}
        files = sorted(Path(self.subject.model).glob("*.safetensors"))
        pairs = ((own[name], saved) for file in files for name, saved in load_file(file, self.subject.device).items())
        return all(torch.equal(mine, saved) for mine, saved in pairs) if files else None


class ByHand(Strategy):
    """What a user writes without this project: PEFT's `save_pretrained`, vLLM's `add_lora`, nothing proven. A fresh
    directory on tmpfs, id and name each time; old directories are removed after the clock stopped."""

    rollback_cases: ClassVar[dict[str, int]] = {"evicted": KEPT_VERSIONS - 2}

    def start(self) -> None:
        self.engine = PlainEngine(self.subject.model, lora_rank=self.subject.rank, **engine_arguments(self.subject))
        self._count = 0
        self._request: Any = None

    def sync(self) -> Synced:
        clock = Clock(self.subject.device)
        self._count += 1
        path = self.folder / str(self._count)
        with clock("write"):
            self.trainer.model.save_pretrained(path)
        with clock("load"):
            self._request = self.engine.load_adapter(path)
        shutil.rmtree(self.folder / str(self._count - KEPT_VERSIONS), ignore_errors=True)
        # PEFT writes the adapter as it is trained, in fp32; at least that much crosses.
        return Synced(clock.seconds, adapter_crossing(self.subject.device, 4 * self.trainer.adapter_elements))

    def mark(self) -> tuple[Any, list[torch.Tensor]]:
        return self._request, self.trainer.snapshot()

    def rollback(self, mark: tuple[Any, list[torch.Tensor]]) -> Synced:
        request, weights = mark
        clock = Clock(self.subject.device)
        with clock("load"):
            self.engine.serve(request)
        with clock("trainer"):
            self.trainer.restore(weights)
        return Synced(clock.seconds, {})

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)


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
        return self.sync(trainer=partial(self.trainer.restore, mark))

    def phases(self) -> Phases:
        """What a sync does, before what the prefix cache holds is dropped."""
        return {}

    def sync(self, **before: Callable[[], object]) -> Synced:
        clock = Clock(self.subject.device)
        for phase, work in {**before, **self.phases(), "cache reset": self.engine.reset_prefix_cache}.items():
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
        named, layer_of = super().weights(), self.engine.layer_of
        self._touched = {name for name, _ in named if layer_of(name.rpartition(".")[0]) in layers}

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
