"""The slot proof: every tensor of the file is bound to a module, and the slot holds exactly the published bytes.

vLLM answers True to adapters that it does not apply, applies in part or at another scale. What it computes with are
the slot tensors, so those are read back and hashed, at every load. At a learning rate of 1e-6 no log-prob tells a
stale adapter from a fresh one; the checksum does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from lora_grpo.adapters.peft_form.files import PREFIX, AdapterFile
from lora_grpo.adapters.peft_form.serving import all_finite
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.compat import slots as vllm_slots
from lora_grpo.engines.delivery.binding import TORCH_DTYPES, Binding, Part, raw_bytes
from lora_grpo.engines.names import NameMap
from lora_grpo.errors import DeliveryError

_FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SlotProver:
    """Binds adapter files to one engine's modules and proves slots. Bindings are kept by file layout."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._modules = vllm_slots.wrapped_modules(llm)
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
        """The bytes proven: the slot of `lora_id` holds what was published. `DeliveryError` names what differs."""
        binding = self.bind(version, file)
        registered = vllm_slots.registered_modules(self._llm, lora_id)
        if registered != binding.modules.keys():
            odd = sorted(registered ^ binding.modules.keys())[0]
            verb = "bound though the file has no tensor for it" if odd in registered else "not bound by vLLM"
            raise DeliveryError(f"{version}: module {odd} is {verb}")
        slot = vllm_slots.slot_of(self._llm, lora_id)
        if slot is None:
            raise DeliveryError(f"{version} (adapter id {lora_id}) is in no slot of the engine")
        served = binding.slot(slot)
        if file.digest_with(served.payload()) != version.digest:
            raise DeliveryError(f"{version}: {self._first_difference(binding, file, slot)}")
        if stray := served.stray():
            raise DeliveryError(f"{version}: {stray} holds values in slot {slot} that the file does not have")
        return len(file.payload)

    def _bind(self, version: AdapterVersion, file: AdapterFile) -> Binding:
        found: dict[str, list[Part]] = {}
        modules: dict[str, list[tuple[Part, Part] | None]] = {}
        owners: dict[tuple[str, int], str] = {}
        for path in file.paths:
            runtime, slices = self._locate(version, path)
            self._check_extents(version, file, path, runtime, slices)
            layer = self._modules[runtime]
            a, b = (f"{PREFIX}{path}.lora_{kind}.weight" for kind in "AB")
            found[a] = [Part(a, layer.lora_a_stacked[index], *file.entries[a].shape) for index in slices]
            found[b] = _rows_of(b, [layer.lora_b_stacked[index] for index in slices], file.entries[b].shape[1])
            members = modules.setdefault(runtime, [None] * len(layer.lora_a_stacked))
            for index, part_a, part_b in zip(slices, found[a], found[b], strict=True):
                if (other := owners.setdefault((runtime, index), path)) != path:
                    raise DeliveryError(f"{version}: {path} and {other} fill the same slice of the engine's {runtime}")
                members[index] = part_a, part_b
        parts: list[Part] = []
        repeated: list[tuple[int, Part]] = []
        for name in file.entries:
            # A B is cut into its layer's slices, an A is the same in each.
            cut = len(found[name]) if name.endswith(".lora_B.weight") else 1
            repeated += [(len(parts), again) for again in found[name][cut:]]
            parts += found[name][:cut]
        return Binding(tuple(parts), tuple(repeated), tuple(self._untouched(modules)), modules)

    def _check_extents(
        self, version: AdapterVersion, file: AdapterFile, path: str, runtime: str, slices: Sequence[int]
    ) -> None:
        """A must fill the layer's input and B its output; only the rank may be smaller than the slot's."""
        layer = self._modules[runtime]
        most, columns = layer.lora_a_stacked[slices[0]].shape[2:]
        rows = sum(layer.lora_b_stacked[index].shape[2] for index in slices)
        (rank, inputs), (outputs, _) = (file.entries[f"{PREFIX}{path}.lora_{kind}.weight"].shape for kind in "AB")
        for kind, size, room in (("A", inputs, columns), ("B", outputs, rows)):
            if size != room:
                raise DeliveryError(
                    f"{version}: {path} has lora_{kind} of size {size} where the engine's layer has {room}; the "
                    "adapter belongs to another model"
                )
        if rank > most:
            raise DeliveryError(f"{version}: {path} has rank {rank}, the engine takes at most {most}")

    def _locate(self, version: AdapterVersion, path: str) -> tuple[str, Sequence[int]]:
        """The layer's name, and the indices of the slices of it that `path` fills."""
        place = self._names.module(path)
        if place is not None and place.name in self._modules:
            every = range(len(self._modules[place.name].lora_a_stacked))
            if place.slices is None or set(place.slices) <= set(every):
                return place.name, every if place.slices is None else place.slices
        nearest = next(iter(get_close_matches(path, self._modules, 1, cutoff=0)), "none")
        raise DeliveryError(
            f"{version}: the engine has no LoRA module for {path}; vLLM would serve the base there without an error. "
            f"The nearest name is {nearest}: check the prefix, the layer index, the architecture and "
            "lora_target_modules"
        )

    def _untouched(self, taken: dict[str, list[tuple[Part, Part] | None]]) -> Iterator[tuple[str, torch.Tensor]]:
        for runtime, layer in self._modules.items():
            members = taken.get(runtime, [None] * len(layer.lora_a_stacked))
            stacks = zip(members, layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            for index, (member, *buffers) in enumerate(stacks):
                if member is None:
                    yield from ((f"{runtime}[{index}]", stacked) for stacked in buffers)

    def _first_difference(self, binding: Binding, file: AdapterFile, slot: int) -> str:
        for part in binding.parts:
            if raw_bytes(part.view(slot)) != raw_bytes(part.read(file)):
                return f"{part.name} in slot {slot} differs from the published bytes"
        return f"slot {slot} differs from the published bytes, as the copy in memory does that it was filled from"


def require_published(version: AdapterVersion, file: AdapterFile) -> None:
    """Raises `DeliveryError` for other bytes than were published, and for values that are not finite: NaN would stay in
    freed KV-cache blocks and poison every later request."""
    if file.digest_with([file.payload]) != version.digest:
        raise DeliveryError(f"{version}: the files at {version.path} are not the ones that were published")
    dtype = TORCH_DTYPES[file.dtype]
    if all_finite(torch.frombuffer(file.payload, dtype=dtype)):
        return
    for name, entry in file.entries.items():
        if not torch.frombuffer(file.payload[entry.start : entry.end], dtype=dtype).isfinite().all():
            raise DeliveryError(f"{version}: {name} holds non-finite values")


def _rows_of(name: str, stacks: Sequence[torch.Tensor], rank: int) -> list[Part]:
    """A B's rows, cut as its slices are, one below the other."""
    parts: list[Part] = []
    for stacked in stacks:
        parts.append(Part(name, stacked, stacked.shape[2], rank, sum(part.rows for part in parts)))
    return parts
