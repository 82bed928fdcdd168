"""Where an adapter file's tensors live in an engine: written there, and read back, without a word per tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_grpo.adapters.files.digest import Buffer
from lora_grpo.adapters.peft_form.files import AdapterFile
from lora_grpo.kernels import Copies

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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

    def padding(self, slot: int) -> Iterator[Tensor]:
        whole = self.stacked[slot, 0]
        yield from (pad for pad in (whole[self.rows :], whole[: self.rows, self.columns :]) if pad.numel())

    def read(self, file: AdapterFile) -> Tensor:
        """A view of a file's mapping."""
        dtype = TORCH_DTYPES[file.dtype]
        start = file.entries[self.name].start + self.first * self.columns * dtype.itemsize
        flat = torch.frombuffer(file.payload, dtype=dtype, count=self.rows * self.columns, offset=start)
        return flat.view(self.rows, self.columns)


@dataclass(frozen=True)
class Binding:
    """A file layout bound to an engine's modules: its parts in payload order, further slices that hold the same as one
    of them (by its index), the buffers it leaves at zero, and each runtime module's A and B by slice, None where the
    file has none."""

    parts: tuple[Part, ...]
    repeated: tuple[tuple[int, Part], ...]
    untouched: tuple[tuple[str, Tensor], ...]
    modules: dict[str, list[tuple[Part, Part] | None]]
    _slots: dict[int, SlotView] = field(default_factory=dict)

    def slot(self, slot: int) -> SlotView:
        """The buffers of one slot. vLLM never rebinds them, so the views are made once."""
        if slot not in self._slots:
            filled = [*self.parts, *(part for _, part in self.repeated)]
            pads = [(part.name, pad) for part in filled for pad in part.padding(slot)]
            others = [(name, stacked[slot]) for name, stacked in self.untouched]
            again = [(index, part.name, part.view(slot)) for index, part in self.repeated]
            self._slots[slot] = SlotView([part.view(slot) for part in self.parts], [*pads, *others], again)
        return self._slots[slot]

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """A file's tensors, each whole and in its order, as the parts are."""
        if len(tensors) == len(self.parts):
            return tensors
        whole = dict(zip(dict.fromkeys(part.name for part in self.parts), tensors, strict=True))
        return [whole[part.name][part.first : part.first + part.rows] for part in self.parts]

    def tensors(self, file: AdapterFile) -> list[Tensor]:
        """The parts of a file, as views of its mapping."""
        return [part.read(file) for part in self.parts]


class SlotView:
    """One slot's tensors in payload order, what must be zero beside them, and what must `repeat` one of them."""

    def __init__(
        self, tensors: list[Tensor], zeros: list[tuple[str, Tensor]], repeats: list[tuple[int, str, Tensor]]
    ) -> None:
        self.tensors, self.zeros, self._repeats = tensors, zeros, repeats
        self._in_place = all(view.device.type == "cpu" for view in tensors)
        self._buffers = list(self._in_order()) if self._in_place else []
        self._copies = Copies(tensors)
        self._flat: Tensor | None = None
        self._host: Tensor | None = None

    @torch.no_grad()
    def write(self, file: AdapterFile, tensors: list[Tensor]) -> None:
        """Copy a file's tensors in, wherever they are, and zeros beside them."""
        if self.tensors[0].device != tensors[0].device:
            flat, pieces = self._gathering()
            flat.copy_(torch.frombuffer(file.payload, dtype=flat.dtype))
            tensors = pieces
        if self._copies.takes(tensors):
            self._copies.run(tensors)
        else:
            torch._foreach_copy_(self.tensors, tensors)
        if self._repeats:
            torch._foreach_copy_(
                [again for _, _, again in self._repeats], [self.tensors[index] for index, _, _ in self._repeats]
            )
        if self.zeros:
            torch._foreach_zero_([tensor for _, tensor in self.zeros])

    def payload(self) -> Iterator[Buffer]:
        """The bytes of the slot's tensors, end to end; each piece is good until the next.

        Where they are not plain host memory they are gathered into one flat buffer first, which crosses in one copy.
        """
        if self._in_place:
            for view, copy, buffer in self._buffers:
                if copy is not None:
                    copy.copy_(view)
                yield buffer
            return
        flat, pieces = self._gathering()
        torch._foreach_copy_(pieces, self.tensors)
        if self._host is None:
            self._host = torch.empty(flat.numel(), dtype=flat.dtype, pin_memory=True)
        yield raw_bytes(self._host.copy_(flat))

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
        """Each tensor, a copy to take of it where its bytes do not lie in a row, and the buffer to hash.

        The copies share one room that stays in the processor's cache.
        """
        strided = [view for view in self.tensors if not view.is_contiguous()]
        room = self.tensors[0].new_empty(max((view.numel() for view in strided), default=0))
        for view in self.tensors:
            copy = None if view.is_contiguous() else room[: view.numel()].view(view.shape)
            yield view, copy, raw_bytes(view if copy is None else copy)

    def stray(self) -> str | None:
        """The name of the first buffer that holds other values than its file's tensor, or that should be zero."""
        if self.zeros and torch.stack([tensor.any() for _, tensor in self.zeros]).any():
            return next(name for name, tensor in self.zeros if tensor.any())
        odd = [(_bits(again) != _bits(self.tensors[index])).any() for index, _, again in self._repeats]
        if odd and torch.stack(odd).any():
            return next(name for (_, name, _), found in zip(self._repeats, odd, strict=True) if found)
        return None

    def _gathering(self) -> tuple[Tensor, list[Tensor]]:
        if self._flat is None:
            like = self.tensors[0]
            self._flat = torch.empty(sum(t.numel() for t in self.tensors), dtype=like.dtype, device=like.device)
        pieces = self._flat.split([tensor.numel() for tensor in self.tensors])
        return self._flat, [piece.view(t.shape) for piece, t in zip(pieces, self.tensors, strict=True)]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, wherever it lives, as a flat buffer (a copy only when it is not contiguous here)."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().data.cast("B")
