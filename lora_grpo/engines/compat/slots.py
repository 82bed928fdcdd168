"""vLLM's own books of the adapters that it holds, and of the slots that requests are computed with."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_grpo.engines.compat import runner
from lora_grpo.errors import ConfigError


def lora_manager(llm: Any) -> Any:
    return runner(llm).lora_manager._adapter_manager


def wrapped_modules(llm: Any) -> dict[str, Any]:
    """vLLM's LoRA-wrapped layers by runtime name (fused ones under their fused name). Each has tuples `lora_a_stacked`
    and `lora_b_stacked` with a tensor (slots, 1, rank, in) or (slots, 1, out, rank) a slice; an unfused layer has one
    slice. Raises `ConfigError` for heads, embeddings and experts, whose buffers are laid out otherwise."""
    modules = dict(lora_manager(llm).modules)
    for name, layer in modules.items():
        if not isinstance(layer.lora_a_stacked, tuple):
            raise ConfigError(f"{name} ({type(layer).__name__}) cannot be proven; leave it out of target_modules")
    return modules


def registered_modules(llm: Any, lora_id: int) -> set[str]:
    adapter = lora_manager(llm).get_adapter(lora_id)
    return set() if adapter is None else set(adapter.loras)


def slot_of(llm: Any, lora_id: int) -> int | None:
    ids = list(lora_manager(llm).lora_index_to_id)
    return ids.index(lora_id) if lora_id in ids else None


def register_adapter(llm: Any, lora_id: int, rank: int, layers: Mapping[str, Any]) -> None:
    """Enter an adapter among vLLM's loaded ones as its own loader leaves it, the least recently used making room.
    `layers` are by runtime name, each as `lora_layer` makes it; `rank` is the largest among them."""
    from vllm.lora.lora_model import LoRAModel

    manager = lora_manager(llm)
    if lora_id in manager._registered_adapters:
        manager._registered_adapters.touch(lora_id)
        return
    if len(manager) + 1 > manager.capacity:
        manager.remove_oldest_adapter()
    made: Any = layers
    manager._registered_adapters[lora_id] = LoRAModel(lora_id, rank, made)


def lora_layer(name: str, members: Sequence[tuple[Any, Any] | None]) -> Any:
    """vLLM's form of one layer's (A, B) of each slice, None for a slice without LoRA. Nothing scales them (scaling 1),
    so vLLM, which multiplies in place, never writes to them."""
    from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights

    rank = max(pair[0].shape[0] for pair in members if pair is not None)
    if len(members) == 1 and members[0] is not None:
        return LoRALayerWeights(name, rank, rank, *members[0], scaling=1.0)
    a, b = ([None if pair is None else pair[side] for pair in members] for side in (0, 1))
    ones = [None if pair is None else 1 for pair in members]
    alphas = [None if pair is None else rank for pair in members]
    return PackedLoRALayerWeights(name, rank, alphas, a, b, scaling=ones)


def free_slot(llm: Any) -> int:
    """A slot that no adapter holds; the least recently used one gives up its own if need be."""
    manager = lora_manager(llm)
    if None not in manager.lora_index_to_id:
        manager._active_adapters.remove_oldest()
    return int(manager.lora_index_to_id.index(None))


def name_slot(llm: Any, slot: int, lora_id: int) -> None:
    """From now on, `slot` is the adapter's: requests that name it are computed with what the slot holds."""
    manager = lora_manager(llm)
    manager._active_adapters[lora_id] = None
    manager.lora_index_to_id[slot] = lora_id
    touch_adapter(llm, lora_id)


def touch_adapter(llm: Any, lora_id: int) -> None:
    manager = lora_manager(llm)
    manager._registered_adapters.touch(lora_id)
    manager._active_adapters.touch(lora_id)
