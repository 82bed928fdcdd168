"""How a version gets into vLLM: through vLLM's own loader, or straight from the mapped file into a slot.

vLLM's loader reads a file's tensors one by one, parses each name three times, and fills a slot a tensor at a time; a
sync is made of that. The direct way does what it does to vLLM's state (an adapter is registered, the least recently
used one makes room, one slot is filled and named) with the copies done in one call. It stands on the same file: vLLM
itself can activate, evict or remove what was loaded so, or read it again from its path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from lora_grpo.adapters.peft_form.files import AdapterFile
from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.compat import slots as vllm_slots
from lora_grpo.engines.delivery.binding import Binding
from lora_grpo.errors import DeliveryError

Loader: TypeAlias = Literal["direct", "stock"]

TESTED = tuple((0, minor) for minor in range(26, 33))
"""The releases whose bookkeeping the direct way was tested to keep; 0.26 has 0.27's LoRA code, line for line."""


@dataclass(frozen=True)
class Loaded:
    """A version that vLLM has: the request that names it, its mapped file, and where its tensors live."""

    version: AdapterVersion
    request: Any
    file: AdapterFile
    binding: Binding

    @property
    def lora_id(self) -> int:
        return int(self.request.lora_int_id)


def choose_loader(wanted: bool) -> Loader:
    """ "direct" when it is wanted and was tested with the installed release, else "stock"."""
    return "direct" if wanted and compat.vllm_release() in TESTED else "stock"


class AdapterLoader:
    def __init__(self, llm: Any, loader: Loader) -> None:
        self._llm, self.kind = llm, loader

    def place(self, loaded: Loaded, held: Held | None = None) -> None:
        """Have vLLM hold it, and in a slot, as the most recently used; nothing where it does already.

        Its tensors come from where they are `held`, else from the file. Raises `DeliveryError` when vLLM refuses it,
        or whatever vLLM raises; the adapter is then to be removed.
        """
        lora_id, file, binding = loaded.lora_id, loaded.file, loaded.binding
        if self.kind == "stock":
            if not self._llm.llm_engine.add_lora(loaded.request):
                raise DeliveryError(f"vLLM refused the adapter at {loaded.request.lora_path}")
        elif vllm_slots.slot_of(self._llm, lora_id) is not None:
            vllm_slots.touch_adapter(self._llm, lora_id)
        else:
            rank = max(placement.rank for placement in binding.modules.values())
            vllm_slots.register_adapter(self._llm, lora_id, rank, LayersOnDemand(binding, file))
            slot = vllm_slots.free_slot(self._llm)
            binding.slot(slot).write(file, binding.tensors(file) if held is None else binding.cut(held))
            vllm_slots.name_slot(self._llm, slot, lora_id)


class LayersOnDemand(Mapping[str, Any]):
    """What vLLM keeps of an adapter's layers, views of the file's mapping, made when it asks: a sync needs none."""

    def __init__(self, binding: Binding, file: AdapterFile) -> None:
        self._binding, self._file = binding, file
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            placement, tensor = self._binding.modules[name], partial(self._binding.tensor, self._file)
            members = [None if pair is None else (tensor(pair[0]), tensor(pair[1])) for pair in placement.members]
            self._made[name] = vllm_slots.lora_layer(name, placement.rank, members)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._binding.modules)

    def __len__(self) -> int:
        return len(self._binding.modules)
