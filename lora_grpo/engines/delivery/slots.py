"""The slot proof: every tensor of the file is bound to a module, and the slot holds exactly the published bytes.

vLLM answers True to adapters that it does not apply, applies in part or at another scale. What it computes with are
the slot tensors, so those are read back and hashed, at every load. At a learning rate of 1e-6 no log-prob tells a
stale adapter from a fresh one; the checksum does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_grpo.adapters.files.disk import Buffer
from lora_grpo.adapters.peft_form.files import PREFIX, AdapterFile
from lora_grpo.adapters.peft_form.serving import Held, all_finite
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.names import NameMap
from lora_grpo.errors import DeliveryError
from lora_grpo.kernels import Copies

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """Where a file tensor lives in vLLM, or its rows from `first` on where it fills several slices of a layer: a
    stacked buffer (slots, 1, rows, columns) and its extent there."""

    name: str
    stacked: Tensor
    rows: int
    columns: int
    first: int = 0

    def view(self, slot: int) -> Tensor:
        return self.stacked[slot, 0, : self.rows, : self.columns]

    def read(self, file: AdapterFile) -> Tensor:
        """A view of a file's mapping."""
        dtype = _TORCH_DTYPES[file.dtype]
        start = file.entries[self.name].start + self.first * self.columns * dtype.itemsize
        flat = torch.frombuffer(file.payload, dtype=dtype, count=self.rows * self.columns, offset=start)
        return flat.view(self.rows, self.columns)


@dataclass(frozen=True)
class Binding:
    """A file layout bound to an engine's modules: its parts in payload order, further slices that repeat one of them,
    the buffers it leaves at zero, and each module's A and B by slice, None where the file has none."""

    parts: list[Part]
    repeated: list[tuple[Part, Part]]
    untouched: list[tuple[str, Tensor]]
    modules: dict[str, list[tuple[Part, Part] | None]]
    _slots: "dict[int, SlotView]" = field(default_factory=dict)

    def slot(self, slot: int) -> "SlotView":
        """The buffers of one slot. vLLM never rebinds them, so the views are made once."""
        if slot not in self._slots:
            self._slots[slot] = SlotView(self, slot)
        return self._slots[slot]

    def tensors(self, file: AdapterFile, held: Held | None) -> list[Tensor]:
        """As the parts are: views of a file's mapping, or of its tensors that are `held`, whole and in its order."""
        if held is None:
            return [part.read(file) for part in self.parts]
        if len(held) == len(self.parts):
            return held
        whole = dict(zip(dict.fromkeys(part.name for part in self.parts), held, strict=True))
        return [whole[part.name][part.first : part.first + part.rows] for part in self.parts]


class SlotView:
    """One slot's tensors in payload order, what must be zero beside them, and what must repeat one of them."""

    def __init__(self, binding: Binding, slot: int) -> None:
        self.tensors = [part.view(slot) for part in binding.parts]
        self._repeats = [(again.name, part.view(slot), again.view(slot)) for part, again in binding.repeated]
        self.zeros = [(name, stacked[slot]) for name, stacked in binding.untouched]
        for part in (*binding.parts, *(again for _, again in binding.repeated)):
            whole = part.stacked[slot, 0]
            beside = whole[part.rows :], whole[: part.rows, part.columns :]
            self.zeros += [(part.name, padding) for padding in beside if padding.numel()]
        self._buffers = list(self._in_order()) if all(view.device.type == "cpu" for view in self.tensors) else []
        self._copies = Copies(self.tensors)

    @cached_property
    def _gathered(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """One flat buffer beside the tensors, its pieces in their shapes, and one as large in pinned host memory."""
        sizes, like = [tensor.numel() for tensor in self.tensors], self.tensors[0]
        flat = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        pieces = [piece.view(own.shape) for piece, own in zip(flat.split(sizes), self.tensors, strict=True)]
        return flat, pieces, torch.empty(sum(sizes), dtype=like.dtype, pin_memory=True)

    @torch.no_grad()
    def write(self, file: AdapterFile, tensors: list[Tensor]) -> None:
        """Copy a file's tensors in, wherever they are, and zeros beside them."""
        if self.tensors[0].device != tensors[0].device:
            flat, tensors, _ = self._gathered
            flat.copy_(torch.frombuffer(file.payload, dtype=flat.dtype))
        if self._copies.takes(tensors):
            self._copies.run(tensors)
        else:
            torch._foreach_copy_(self.tensors, tensors)
        if self._repeats:
            torch._foreach_copy_([again for *_, again in self._repeats], [first for _, first, _ in self._repeats])
        if self.zeros:
            torch._foreach_zero_([tensor for _, tensor in self.zeros])

    def payload(self) -> Iterator[Buffer]:
        """The bytes of the slot's tensors, end to end; each piece is good until the next. Where they are not plain host
        memory they are gathered into one flat buffer first, which crosses in one copy."""
        for view, copy, buffer in self._buffers:
            if copy is not None:
                copy.copy_(view)
            yield buffer
        if not self._buffers:
            flat, pieces, host = self._gathered
            torch._foreach_copy_(pieces, self.tensors)
            yield _raw_bytes(host.copy_(flat))

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
        """Each tensor, a copy to take of it where its bytes do not lie in a row, and the buffer to hash."""
        # The copies share one room that stays in the processor's cache.
        strided = [view for view in self.tensors if not view.is_contiguous()]
        room = self.tensors[0].new_empty(max((view.numel() for view in strided), default=0))
        for view in self.tensors:
            copy = None if view.is_contiguous() else room[: view.numel()].view(view.shape)
            yield view, copy, _raw_bytes(view if copy is None else copy)

    def stray(self) -> str | None:
        """The name of the first buffer that holds other values than its file's tensor, or that should be zero."""
        odd = [(name, tensor.any()) for name, tensor in self.zeros]
        odd += [(name, (again.view(torch.uint8) != own.view(torch.uint8)).any()) for name, own, again in self._repeats]
        if odd and torch.stack([found for _, found in odd]).any():
            return next(name for name, found in odd if found)
        return None


def _raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, wherever it lives, as a flat buffer (a copy only when it is not contiguous here)."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().data.cast("B")


class SlotProver:
    """Binds adapter files to one engine's modules and proves slots. Bindings are kept by file layout."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._modules = compat.wrapped_modules(llm)
        self._names = NameMap(compat.runner(llm).get_model())
        self._bindings: dict[bytes, Binding] = {}

    def bind(self, version: AdapterVersion, file: AdapterFile) -> Binding:
        """Where each tensor of `file` must go; raises `DeliveryError` naming the first that has no place."""
        dtype, expected = str(_TORCH_DTYPES[file.dtype]).removeprefix("torch."), compat.lora_dtype(self._llm)
        if dtype != expected:
            raise DeliveryError(f"{version} is {dtype}, the engine keeps adapters in {expected}; publish it so")
        if file.header not in self._bindings:
            self._bindings[file.header] = self._bind(version, file)
        return self._bindings[file.header]

    def prove(self, version: AdapterVersion, file: AdapterFile, lora_id: int) -> int:
        """The bytes proven: the slot of `lora_id` holds what was published. `DeliveryError` names what differs."""
        binding = self.bind(version, file)
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
            odd_parts = (part for part in binding.parts if _raw_bytes(part.view(slot)) != _raw_bytes(part.read(file)))
            differing = next((part.name for part in odd_parts), "the copy in memory that was written")
            raise DeliveryError(f"{version}: {differing} in slot {slot} differs from the published bytes")
        if stray := served.stray():
            raise DeliveryError(f"{version}: {stray} holds values in slot {slot} that the file does not have")
        return len(file.payload)

    def _bind(self, version: AdapterVersion, file: AdapterFile) -> Binding:
        found: dict[str, list[Part]] = {name: [] for name in file.entries}
        modules: dict[str, list[tuple[Part, Part] | None]] = {}
        for path in file.paths:
            runtime, slices = self._locate(version, path)
            layer = self._modules[runtime]
            a, b = (f"{PREFIX}{path}.lora_{kind}.weight" for kind in "AB")
            (rank, inputs), (outputs, _) = file.entries[a].shape, file.entries[b].shape
            _check_extents(f"{version}: {path}", layer, slices, rank, inputs, outputs)
            members = modules.setdefault(runtime, [None] * len(layer.lora_a_stacked))
            for index in slices:
                if (other := members[index]) is not None:
                    raise DeliveryError(f"{version}: {a} and {other[0].name} fill the same slice of {runtime}")
                stacked, above = layer.lora_b_stacked[index], sum(part.rows for part in found[b])
                found[a].append(Part(a, layer.lora_a_stacked[index], rank, inputs))
                found[b].append(Part(b, stacked, stacked.shape[2], rank, above))
                members[index] = found[a][-1], found[b][-1]
        parts: list[Part] = []
        repeated: list[tuple[Part, Part]] = []
        for name, filled in found.items():
            # A B is cut into its layer's slices, an A is the same in each.
            cut = len(filled) if name.endswith(".lora_B.weight") else 1
            parts += filled[:cut]
            repeated += [(filled[0], again) for again in filled[cut:]]
        untouched = []
        for runtime, layer in self._modules.items():
            members = modules.get(runtime, [None] * len(layer.lora_a_stacked))
            stacks = zip(members, layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            for index, (member, *buffers) in enumerate(stacks):
                untouched += [(f"{runtime}[{index}]", stacked) for stacked in buffers if member is None]
        return Binding(parts, repeated, untouched, modules)

    def _locate(self, version: AdapterVersion, path: str) -> tuple[str, Sequence[int]]:
        """The layer's name, and the indices of the slices of it that `path` fills."""
        place = self._names.module(path)
        if place is not None and place.name in self._modules:
            every = range(len(self._modules[place.name].lora_a_stacked))
            if place.slices is None or set(place.slices) <= set(every):
                return place.name, every if place.slices is None else place.slices
        nearest = next(iter(get_close_matches(path, self._modules, 1, cutoff=0)), "none")
        said = f"{version}: the engine has no LoRA module for {path}; vLLM would serve the base there without an error"
        fix = "check prefix, layer index, architecture and lora_target_modules"
        raise DeliveryError(f"{said}. The nearest name is {nearest}: {fix}")


def _check_extents(said: str, layer: Any, slices: Sequence[int], rank: int, inputs: int, outputs: int) -> None:
    """A must fill the layer's input and B its output; only the rank may be smaller than the slot's."""
    most, columns = layer.lora_a_stacked[slices[0]].shape[2:]
    rows = sum(layer.lora_b_stacked[index].shape[2] for index in slices)
    for kind, size, room in (("A", inputs, columns), ("B", outputs, rows)):
        if size != room:
            there = f"lora_{kind} of size {size} where the engine's layer has {room}"
            raise DeliveryError(f"{said} has {there}; the adapter belongs to another model")
    if rank > most:
        raise DeliveryError(f"{said} has rank {rank}, the engine takes at most {most}")


def require_published(version: AdapterVersion, file: AdapterFile) -> None:
    """Raises `DeliveryError` for other bytes than were published, and for values that are not finite: NaN would stay in
    freed KV-cache blocks and poison every later request."""
    if file.digest_with([file.payload]) != version.digest:
        raise DeliveryError(f"{version}: the files at {version.path} are not the ones that were published")
    dtype = _TORCH_DTYPES[file.dtype]
    if not all_finite(torch.frombuffer(file.payload, dtype=dtype)):
        spans = {name: file.payload[entry.start : entry.end] for name, entry in file.entries.items()}
        odd = next(name for name, span in spans.items() if not torch.frombuffer(span, dtype=dtype).isfinite().all())
        raise DeliveryError(f"{version}: {odd} holds non-finite values")
