"""The versions that an in-process engine holds: loaded, given a slot, proven in it, let go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import LoadReceipt
from lora_grpo.engines.compat import ending
from lora_grpo.engines.compat import slots as vllm_slots
from lora_grpo.engines.delivery.slots import SlotProver, require_published
from lora_grpo.engines.loaded import LoadedVersions
from lora_grpo.engines.local.driving import StepDriver
from lora_grpo.engines.local.loading import AdapterLoader, Loaded
from lora_grpo.errors import EngineError, LoraGrpoError


class Residents(LoadedVersions[Loaded]):
    """Those that answer `driver`'s requests stay."""

    def __init__(
        self,
        llm: Any,
        driver: StepDriver,
        loader: AdapterLoader,
        prover: SlotProver,
        *,
        max_loras: int,
        max_cpu_loras: int,
    ) -> None:
        super().__init__()
        self._llm, self._driver, self._loader, self._prover = llm, driver, loader, prover
        self._max_loras, self._max_cpu_loras = max_loras, max_cpu_loras
        self._ids = itertools.count(1)

    def load(self, version: AdapterVersion, held: Held | None = None) -> LoadReceipt:
        known = self.known(version)
        if known is not None:
            self.add(known)
            return self._prove_again(known)
        started = time.perf_counter()
        file = open_adapter(version)
        if self._loader.kind != "direct":
            held = None
        if held is None:
            require_published(version, file)
        binding = self._prover.bind(version, file)
        checked = time.perf_counter()
        self._make_room()
        loaded = Loaded(version, self._request(version), file, binding)
        with self.boundary(f"load {version}", forget=loaded):
            receipt = self._place_and_prove(loaded, started, checked, held)
            self.add(loaded)
        return receipt

    def unload(self, version: AdapterVersion) -> None:
        """Raises `EngineError` for one that answers requests."""
        loaded = self.find(version)
        if loaded.lora_id in self._driver.answering:
            raise EngineError(f"{version} is still answering requests; unload it when they are done")
        with self.boundary(f"unload {version}"):
            self._llm.llm_engine.remove_lora(loaded.lora_id)
            self.remove(loaded)

    def slots_for(self, wanted: Sequence[Loaded]) -> int:
        """How many versions may share a batch now; raises `EngineError` when those in a rollout hold every slot."""
        answering = self._driver.answering
        free = self._max_loras - len(answering)
        new = [str(loaded.version) for loaded in wanted if loaded.lora_id not in answering]
        if new and free < 1:
            raise EngineError(
                f"{new[0]} cannot be sampled from now: the {len(answering)} versions of a rollout that is not done "
                f"hold all slots; start the engine with more than max_loras={self._max_loras}, or wait until it is done"
            )
        return free if new else self._max_loras

    def place(self, wanted: Sequence[Loaded]) -> None:
        """See to it that every wanted version holds a slot, proving again those that vLLM copies into one."""
        distinct = {loaded.version.path: loaded for loaded in wanted}
        for loaded in distinct.values():
            self.add(loaded)
            if vllm_slots.slot_of(self._llm, loaded.lora_id) is not None:
                self._loader.place(loaded)
        for loaded in distinct.values():
            if vllm_slots.slot_of(self._llm, loaded.lora_id) is None:
                self._prove_again(loaded)

    def prove_all_again(self) -> None:
        """Every loaded version, none of which can be found until it is proven.

        One that cannot be proven is unloaded; the first such failure is raised when the others are.
        """
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
        """A failure inside leaves nothing scheduled that was, and nothing of the version to `forget`.

        vLLM draws from torch's global generators; a trainer in this process finds them as it left them, unless it goes
        on in another thread: what it draws meanwhile would come again.
        """

        def clean_up() -> None:
            if stepping or (forget is not None and forget.lora_id in self._driver.answering):
                ending.abort_everything(self._llm)
                self._driver.forget()
            if forget is not None:
                self.remove(forget)
                self._llm.llm_engine.remove_lora(forget.lora_id)

        with ending.vllm_boundary(doing, clean_up), nullcontext() if self._driver.between_steps else _generators_kept():
            yield

    def _prove_again(self, loaded: Loaded) -> LoadReceipt:
        """Have a loaded version hold a slot and prove it; a failure unloads it."""
        started = time.perf_counter()
        with self.boundary(f"activate {loaded.version}", forget=loaded):
            return self._place_and_prove(loaded, started, started)

    def _place_and_prove(self, loaded: Loaded, started: float, checked: float, held: Held | None = None) -> LoadReceipt:
        for lora_id in self._driver.answering:
            # The slot that another takes is the least recently used one.
            vllm_slots.touch_adapter(self._llm, lora_id)
        self._loader.place(loaded, held)
        placed = time.perf_counter()
        proven_bytes = self._prover.prove(loaded.version, loaded.file, loaded.lora_id)
        seconds = {"check": checked - started, "load": placed - checked, "prove": time.perf_counter() - placed}
        return LoadReceipt("slots", seconds, len(loaded.file.paths), proven_bytes, self._loader.kind)

    def _make_room(self) -> None:
        """Unload the least recently used versions until another fits; those that answer requests stay."""
        answering = self._driver.answering
        idle = [one.version for one in self.all() if one.lora_id not in answering]
        excess = max(0, len(self.all()) + 1 - self._max_cpu_loras)
        if excess > len(idle) or len(answering) >= self._max_loras:
            raise EngineError(
                f"{len(answering)} versions are answering requests, so there is no room for another: start the engine "
                f"with more than max_loras={self._max_loras}, max_cpu_loras={self._max_cpu_loras}"
            )
        for version in idle[:excess]:
            self.unload(version)

    def _request(self, version: AdapterVersion) -> Any:
        from vllm.lora.request import LoRARequest

        lora_id = next(self._ids)
        return LoRARequest(f"{version.path.parent.parent.name}-v{version.number}-{lora_id}", lora_id, str(version.path))


def _generators_kept() -> AbstractContextManager[None]:
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else [])
