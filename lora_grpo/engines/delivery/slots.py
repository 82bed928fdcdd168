"""The slot proof: every tensor of the file is bound to a module, and the slot holds exactly the published bytes.

vLLM answers True to adapters that it does not apply, applies in part or at another scale. What it computes with are
the slot tensors, so those are read back and hashed, at every load. At a learning rate of 1e-6 no log-prob tells a
stale adapter from a fresh one; the checksum does.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch

from lora_grpo.adapters.peft_files import PREFIX, AdapterFile
from lora_grpo.adapters.peft_format import all_finite
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.delivery.binding import TORCH_DTYPES, Binding, Part, Placement, raw_bytes
from lora_grpo.engines.names import NameMap
from lora_grpo.errors import DeliveryError

_FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SlotProver:
    """Binds adapter files to one engine's modules and proves slots. Bindings are kept by file layout."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._modules = compat.wrapped_modules(llm)
        self._names = NameMap(compat.runner(llm).get_model())
        self._bindings: dict[bytes, Binding] = {}

    def bind(self, version: AdapterVersion, file: AdapterFile) -> Binding:
        """Where each tensor of `file` must go; raises `DeliveryError` naming the first that has no place."""
        expected = _FILE_DTYPES[compat.lora_dtype(self._llm)]
        if file.dtype != expected:
            raise DeliveryError(f"{version} is {file.dtype}, the engine keeps adapters in {expected}; publish it so")
        if file.header not in self._bindings:
            self._bindings[file.header] = self._bind(version, file)
        return self._bindings[file.header]

    def prove(self, version: AdapterVersion, file: AdapterFile, lora_id: int) -> int:
        """Compare the slot of `lora_id` with what was published, bit for bit; returns the bytes proven.

        Raises `DeliveryError` naming the module that differs.
        """
        binding = self._bindings[file.header] if file.header in self._bindings else self.bind(version, file)
        registered = compat.registered_modules(self._llm, lora_id)
        if registered != binding.modules.keys():
            odd = sorted(registered ^ binding.modules.keys())[0]
            verb = "bound though the file has no tensor for it" if odd in registered else "not bound by vLLM"
            raise DeliveryError(f"{version}: module {odd} is {verb}")
        slot = compat.slot_of(self._llm, lora_id)
        if slot is None:
            raise DeliveryError(f"{version} (adapter id {lora_id}) is in no slot of the engine")
        served = binding.slot(slot)
        if file.digest_with(served.payload()) != version.digest:
            raise DeliveryError(f"{version}: {self._first_difference(binding, file, slot)}")
        if stray := served.nonzero():
            raise DeliveryError(f"{version}: {stray} holds values in slot {slot} that the file does not have")
        return len(file.payload)

    def _bind(self, version: AdapterVersion, file: AdapterFile) -> Binding:
        order = {name: index for index, name in enumerate(file.entries)}
        parts: dict[str, Part] = {}
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for path in file.paths:
            runtime, index = self._locate(version, path)
            layer = self._modules[runtime]
            a, b = (f"{PREFIX}{path}.lora_{kind}.weight" for kind in "AB")
            places.setdefault(runtime, {})[index] = (order[a], order[b])
            for kind, name, stacked in (("A", a, layer.lora_a_stacked[index]), ("B", b, layer.lora_b_stacked[index])):
                rows, columns = file.entries[name].shape
                _check_extent(version, path, kind, (rows, columns), tuple(stacked.shape[2:]))
                parts[name] = Part(name, stacked, rows, columns)
        ordered = tuple(parts[name] for name in file.entries)
        modules = {runtime: self._placement(runtime, found, ordered) for runtime, found in places.items()}
        return Binding(ordered, tuple(self._untouched(places)), modules)

    def _placement(self, runtime: str, found: dict[int, tuple[int, int]], parts: tuple[Part, ...]) -> Placement:
        members = len(self._modules[runtime].lora_a_stacked)
        rank = max(parts[a].rows for a, _ in found.values())
        return Placement(rank, tuple(found.get(index) for index in range(members)))

    def _locate(self, version: AdapterVersion, path: str) -> tuple[str, int]:
        place = self._names.module(path)
        if place is None or place.name not in self._modules:
            nearest = next(iter(get_close_matches(path, self._modules, 1, cutoff=0)), "none")
            raise DeliveryError(
                f"{version}: the engine has no LoRA module for {path}; vLLM would serve the base there without a word. "
                f"The nearest that it has is {nearest}: check the prefix, the layer index, the architecture and "
                "lora_target_modules"
            )
        slices = range(len(self._modules[place.name].lora_a_stacked)) if place.slices is None else place.slices
        if len(slices) != 1:
            raise DeliveryError(
                f"{version}: {path} fills {len(slices)} slices of the engine's {place.name}, which adapters are not "
                "served for; leave it out of target_modules"
            )
        return place.name, slices[0]

    def _untouched(self, taken: dict[str, dict[int, tuple[int, int]]]) -> Iterator[tuple[str, torch.Tensor]]:
        for runtime, layer in self._modules.items():
            for index, stacks in enumerate(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)):
                if index not in taken.get(runtime, {}):
                    yield from ((f"{runtime}[{index}]", stacked) for stacked in stacks)

    def _first_difference(self, binding: Binding, file: AdapterFile, slot: int) -> str:
        for part in binding.parts:
            entry = file.entries[part.name]
            served, published = raw_bytes(part.view(slot)), bytes(file.payload[entry.start : entry.end])
            if served != published:
                return f"{part.name} in slot {slot} differs from the published bytes"
        return f"slot {slot} differs from the published bytes, as the copy in memory does that it was filled from"


def require_finite(version: AdapterVersion, file: AdapterFile) -> None:
    """NaN in an adapter would stay in freed KV-cache blocks and poison every later request."""
    dtype = TORCH_DTYPES[file.dtype]
    if all_finite(torch.frombuffer(file.payload, dtype=dtype)):
        return
    for name, entry in file.entries.items():
        if not torch.frombuffer(file.payload[entry.start : entry.end], dtype=dtype).isfinite().all():
            raise DeliveryError(f"{version}: {name} holds non-finite values")


def _check_extent(version: AdapterVersion, path: str, kind: str, shape: tuple[int, int], room: tuple[int, ...]) -> None:
    """A must fill the layer's input and B its output; only the rank may be smaller than the slot's."""
    rank, size = (shape[0], shape[1]) if kind == "A" else (shape[1], shape[0])
    room_rank, room_size = (room[0], room[1]) if kind == "A" else (room[1], room[0])
    if size != room_size:
        raise DeliveryError(
            f"{version}: {path} has lora_{kind} of size {size} where the engine's layer has {room_size}; the adapter "
            "belongs to another model"
        )
    if rank > room_rank:
        raise DeliveryError(f"{version}: {path} has rank {rank}, the engine takes at most {room_rank}")
