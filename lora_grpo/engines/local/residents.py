"""The versions that an in-process engine holds: loaded, given a slot, proven in it, let go.

vLLM's loader parses each name three times and fills a slot a tensor at a time; a sync is made of that. The direct way
does what it does to vLLM's state (an adapter is registered, the least recently used one makes room, one slot is filled
and named) with all copies in one call, on the same file: vLLM can activate, evict, remove or read it again itself."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch

from lora_grpo.adapters.peft_form.files import AdapterFile, open_adapter
from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.base import LoadedVersions, LoadReceipt
from lora_grpo.engines.delivery.slots import Binding, SlotProver, require_published
from lora_grpo.engines.local.running import StepDriver, vllm_boundary
from lora_grpo.errors import DeliveryError, EngineError, LoraGrpoError


class Loaded(NamedTuple):
    """A version that vLLM has: the request that names it, its mapped file, and where its tensors live."""

    version: AdapterVersion
    lora_id: int
    request: Any
    file: AdapterFile
    binding: Binding


class Residents(LoadedVersions[Loaded]):
    def __init__(self, llm: Any, driver: StepDriver, *, direct: bool, max_loras: int, max_cpu_loras: int) -> None:
        super().__init__()
        self._llm, self._driver = llm, driver
        self._loader: Literal["direct", "stock"] = "direct" if direct else "stock"
        self._prover = SlotProver(llm)
        self._max_loras, self._max_cpu_loras = max_loras, max_cpu_loras
        self._ids = itertools.count(1)

    def load(self, version: AdapterVersion, held: Held | None = None) -> LoadReceipt:
        from vllm.lora.request import LoRARequest

        if (known := self.known(version)) is not None:
            self.add(known)
            return self._prove_again(known)
        started = time.perf_counter()
        file = open_adapter(version)
        if held is None or self._loader == "stock":
            require_published(version, file)
        binding = self._prover.bind(version, file)
        checked = time.perf_counter()
        self._make_room()
        lora_id = next(self._ids)
        name = f"{version.path.parent.parent.name}-v{version.number}-{lora_id}"
        loaded = Loaded(version, lora_id, LoRARequest(name, lora_id, str(version.path)), file, binding)
        with self.boundary(f"load {version}", forget=loaded):
            receipt = self._place_and_prove(loaded, started, checked, held)
            self.add(loaded)
        return receipt

    def unload(self, loaded: Loaded) -> None:
        """Raises `EngineError` for one that answers requests."""
        if loaded.lora_id in self._driver.answering:
            raise EngineError(f"{loaded.version} is still answering requests; unload it when they are done")
        with self.boundary(f"unload {loaded.version}"):
            self._llm.llm_engine.remove_lora(loaded.lora_id)
            self.remove(loaded)

    def slots_for(self, wanted: Sequence[Loaded | None]) -> int:
        """How many versions may share a batch now; raises `EngineError` when those in a rollout hold every slot."""
        answering = self._driver.answering
        free = self._max_loras - len(answering)
        new = [loaded.version for loaded in wanted if loaded is not None and loaded.lora_id not in answering]
        if new and free < 1:
            why = f"the {len(answering)} versions of a rollout that is not done hold all slots"
            fix = f"start the engine with more than max_loras={self._max_loras}, or wait until it is done"
            raise EngineError(f"{new[0]} cannot be sampled from now: {why}; {fix}")
        return free if new else self._max_loras

    def place(self, wanted: Sequence[Loaded | None]) -> None:
        """See to it that every wanted version holds a slot, proving again those that vLLM copies into one."""
        distinct = {loaded.lora_id: loaded for loaded in wanted if loaded is not None}
        for lora_id, loaded in distinct.items():
            self.add(loaded)
            if compat.slot_of(self._llm, lora_id) is not None:
                compat.touch_adapter(self._llm, lora_id)
        for lora_id, loaded in distinct.items():
            if compat.slot_of(self._llm, lora_id) is None:
                self._prove_again(loaded)

    def prove_all_again(self) -> None:
        """None can be found until it is proven. What cannot be is unloaded; the first such failure is raised last."""
        unproven, self._by_path, failures = self.all(), {}, []
        for loaded in unproven:
            try:
                self._prove_again(loaded)
                self.add(loaded)
            except LoraGrpoError as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    @contextmanager
    def boundary(self, doing: str, *, forget: Loaded | None = None, stepping: bool = False) -> Iterator[None]:
        """A failure inside leaves nothing scheduled that was, and nothing of the version to `forget`. Generators of
        torch are left as they were, unless a trainer goes on in another thread: what it draws would come again."""

        def clean_up() -> None:
            if stepping or (forget is not None and forget.lora_id in self._driver.answering):
                self._driver.abort()
            if forget is not None:
                self.remove(forget)
                self._llm.llm_engine.remove_lora(forget.lora_id)

        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        alone = self._driver.between_steps is None
        with vllm_boundary(doing, clean_up), torch.random.fork_rng(devices) if alone else nullcontext():
            yield

    def _prove_again(self, loaded: Loaded) -> LoadReceipt:
        """A failure unloads it."""
        started = time.perf_counter()
        with self.boundary(f"activate {loaded.version}", forget=loaded):
            return self._place_and_prove(loaded, started, started)

    def _place_and_prove(self, loaded: Loaded, started: float, checked: float, held: Held | None = None) -> LoadReceipt:
        """Its tensors are the `held` ones, else the file's. Raises whatever vLLM raises; it is then to be removed."""
        llm, lora_id, file, binding = self._llm, loaded.lora_id, loaded.file, loaded.binding
        for answering in self._driver.answering:
            # The slot that another takes is the least recently used one.
            compat.touch_adapter(llm, answering)
        if compat.slot_of(llm, lora_id) is not None:
            compat.touch_adapter(llm, lora_id)
        elif self._loader == "direct":
            rank = max(part.rows for members in binding.modules.values() for part, _ in filter(None, members))
            tensors = binding.tensors(file, held)
            layers = LayersOnDemand(binding, file)
            compat.place_adapter(llm, lora_id, rank, layers, lambda slot: binding.slot(slot).write(file, tensors))
        elif not llm.llm_engine.add_lora(loaded.request):
            raise DeliveryError(f"vLLM refused the adapter at {loaded.request.lora_path}")
        placed = time.perf_counter()
        proven_bytes = self._prover.prove(loaded.version, file, lora_id)
        seconds = {"check": checked - started, "load": placed - checked, "prove": time.perf_counter() - placed}
        return LoadReceipt("slots", seconds, len(file.paths), proven_bytes, self._loader)

    def _make_room(self) -> None:
        """Unload the least recently used versions until another fits; those that answer requests stay."""
        answering = self._driver.answering
        idle = [one for one in self.all() if one.lora_id not in answering]
        excess = max(0, len(self.all()) + 1 - self._max_cpu_loras)
        if excess > len(idle) or len(answering) >= self._max_loras:
            said = f"{len(answering)} versions are answering requests, so there is no room for another"
            most = f"max_loras={self._max_loras}, max_cpu_loras={self._max_cpu_loras}"
            raise EngineError(f"{said}: start the engine with more than {most}")
        for loaded in idle[:excess]:
            self.unload(loaded)


class LayersOnDemand(Mapping[str, Any]):
    """What vLLM keeps of an adapter's layers, views of the file's mapping, made when it asks: a sync needs none. They
    are scaled by alpha / r = 1, so vLLM, which multiplies in place, never writes to them."""

    def __init__(self, binding: Binding, file: AdapterFile) -> None:
        self._binding, self._file = binding, file

    def __getitem__(self, name: str) -> Any:
        from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights

        members = self._binding.modules[name]
        rank = max(pair[0].rows for pair in members if pair is not None)
        a, b = ([pair and pair[side].read(self._file) for pair in members] for side in (0, 1))
        if len(members) == 1:
            return LoRALayerWeights(name, rank, rank, a[0], b[0])
        alphas, ones = ([pair and one for pair in members] for one in (rank, 1))
        return PackedLoRALayerWeights(name, rank, alphas, a, b, scaling=ones)

    def __iter__(self) -> Iterator[str]:
        return iter(self._binding.modules)

    def __len__(self) -> int:
        return len(self._binding.modules)
