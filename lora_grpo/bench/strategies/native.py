"""The adapter alone goes to the engine: by this project's path, proof included in the time, and by hand."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_latest
from lora_grpo.bench.gauges import Clock, adapter_crossing
from lora_grpo.bench.strategies.base import Strategy, Synced, Trainer, checkpoint_name, engine_arguments
from lora_grpo.engines.local.weights import PlainEngine
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.sync import NativeSync

KEPT_VERSIONS = 8


class Native(Strategy):
    """`NativeSync.push`, as a user calls it."""

    rollback_cases: ClassVar[dict[str, int]] = {"still loaded": 1, "evicted": KEPT_VERSIONS - 2}
    engine_options: ClassVar[dict[str, Any]] = {}

    def start(self) -> None:
        self.start_engine()
        self.connect()

    def start_engine(self) -> None:
        self.engine = VLLMEngine(
            self.subject.model,
            max_lora_rank=self.subject.rank,
            target_modules=None if self.subject.targets == "all-linear" else self.subject.target_modules,
            **self.engine_options,
            **engine_arguments(self.subject),
        )

    def connect(self) -> None:
        """Prove the path from the trainer to the engine."""
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
        return Synced(
            {**receipt.seconds, "device": device_s},
            adapter_crossing(self.subject.device, self.pusher.adapter_bytes),
            receipt.keeping_s,
        )

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
