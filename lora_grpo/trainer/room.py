"""What an engine is started for, of one run or of a population, and how many of its members memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from peft import LoraConfig
from torch import nn

from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.compat import allowed_rank
from lora_grpo.engines.local.targets import check_whole, checkpoint_config
from lora_grpo.errors import ConfigError
from lora_grpo.trainer.activations import LargestBatch
from lora_grpo.trainer.memory import MemoryEstimate, available_memory, engine_dtype, estimate, mib, version_bytes
from lora_grpo.trainer.models import (
    Sharing,
    adapted_leaves,
    checkpoint_of,
    default_device,
    expects_one_copy,
    lora_rank,
    quantization_of,
)


@dataclass(frozen=True)
class Wanted:
    """What one member needs: its adapter, and the largest batch that it learns from at a time.

    A run that is none of a population is a member too, the only one.
    """

    peft_config: Any
    batch: LargestBatch
    checkpointing: bool | None
    rows: int = 0
    """Completions a step, for what the members of a population sample together."""


@dataclass(frozen=True)
class Room:
    """The engine's settings, the largest `rank`, all `leaves` (None: all linear layers), and the memory of `members`
    at a time."""

    engine_config: EngineConfig
    rank: int
    leaves: list[str] | None
    version_bytes: int
    """Of the tensors of a version, the largest member's."""
    members: int
    memory: MemoryEstimate
    joint_kv_bytes: int
    """What the rows of one round of several members take of the KV cache at most."""
    fit: int
    """How many members memory holds, the largest first."""
    checkpointing: bool
    """Whether activations are computed twice, for members that leave it open."""

    def __str__(self) -> str:
        said = str(self.memory) if self.members == 1 else f"{self.members} members take {self.memory}"
        if self.joint_kv_bytes:
            said += f"; of the KV cache, the rows of a round take {mib(self.joint_kv_bytes)} at most"
        return said + (", activations computed twice" if self.checkpointing else "")

    def require(self) -> None:
        """Raises `ConfigError` when memory does not hold the members, with how many it does."""
        if self.fit < self.members:
            device = default_device()
            free = f"{device} has {mib(available_memory(device))} free"
            if self.members == 1:
                fix = self.memory.what_helps()
                raise ConfigError(f"the run needs {self.memory}, and {free}: {fix}, or use a smaller model")
            others = f"pass at_once={self.fit}, so that the others wait" if self.fit else "use a smaller model"
            raise ConfigError(
                f"{self}, and {free}, which holds {self.fit} of them: {others}, or give them smaller adapters or "
                "micro-batches"
            )

    def check(self, model: ModelConfig, peft_config: Any, engine: Engine) -> None:
        """Raises `ConfigError` for an adapter that the engine was not started for."""
        rank, leaves = lora_rank(model, peft_config), adapted_leaves(model, peft_config)
        if rank > engine.max_lora_rank:
            raise ConfigError(
                f"an adapter of rank {rank}: the population's engine was started for ranks up to "
                f"{engine.max_lora_rank}; give a member of that rank at the start"
            )
        if self.leaves is not None and (leaves is None or not {*leaves} <= {*self.leaves}):
            raise ConfigError(
                f"target_modules={peft_config.target_modules!r}: the population's engine was started for "
                f"{', '.join(self.leaves)}; give a member with those layers at the start"
            )


def plan_room(
    model: ModelConfig | nn.Module,
    members: Sequence[Wanted],
    config: EngineConfig,
    sharing: Sharing,
    at_once: int,
    *,
    own_engine: bool = True,
) -> Room:
    """The room for `at_once` of the members, whichever they are; an engine that is not its own is there already.

    Raises `ConfigError` for a base or an adapter that cannot be.
    """
    if own_engine or isinstance(model, ModelConfig):
        check_whole(checkpoint_of(model).name)
    rank = max(lora_rank(model, member.peft_config) for member in members)
    adapted = [adapted_leaves(model, member.peft_config) for member in members]
    leaves = None if None in adapted else sorted({leaf for own in adapted for leaf in own or ()})
    # Servers hold as many versions as there are slots: the one that is published beside the others needs a place too.
    slots = max(config.max_loras, at_once + bool(config.urls))
    most = max(rank, config.max_lora_rank or 0)
    sized: EngineConfig = config.replace(max_loras=slots, max_lora_rank=most)
    if own_engine:
        _check_servable(model, most, config, sharing)
    estimated = _estimates(model, sized if own_engine else None, expects_one_copy(sharing, model, config))
    joint = members[0].peft_config if len(members) == 1 else LoraConfig(r=1, target_modules=leaves or "all-linear")
    joint_kv_bytes = _kv_bytes(model, members, config, at_once) if isinstance(model, ModelConfig) and at_once > 1 else 0

    def room(*, twice: bool) -> Room:
        engine = estimated(joint, members[0], twice)
        each = [estimated(member.peft_config, member, twice) for member in members]
        each.sort(key=_own_bytes, reverse=True)
        memory = _together(engine, each[:at_once])
        slot_bytes = engine.adapter_slots_bytes // slots
        fixed_bytes = memory.total_bytes - sum(map(_own_bytes, each[:at_once])) - slot_bytes * at_once
        totals_bytes = accumulate((_own_bytes(one) + slot_bytes for one in each), initial=fixed_bytes)
        fit = sum(total <= available_memory(default_device()) for total in totals_bytes) - 1
        of_version = version_bytes(each[0], config)
        return Room(sized, rank, leaves, of_version, at_once, memory, joint_kv_bytes, max(0, fit), twice)

    found = room(twice=all(member.checkpointing for member in members))
    open_ones = any(member.checkpointing is None for member in members)
    return room(twice=True) if found.fit < at_once and open_ones else found


def _check_servable(model: ModelConfig | nn.Module, rank: int, config: EngineConfig, sharing: Sharing) -> None:
    """Raises `ConfigError` for what an engine that is yet to start would refuse."""
    if not config.urls:
        allowed_rank(rank)
    if quantization_of(checkpoint_of(model)) is not None and sharing is True:
        raise ConfigError("share_base_weights=True: the engine's quantized weights are not the trainer's; leave it out")


def _estimates(
    model: ModelConfig | nn.Module, config: EngineConfig | None, one_copy: bool
) -> Callable[[Any, Wanted, bool], MemoryEstimate]:
    """Of an adapter and the member that trains it, `twice` where it leaves that open; each worked out once."""
    known: dict[Any, MemoryEstimate] = {}

    def of(peft_config: Any, member: Wanted, twice: bool) -> MemoryEstimate:
        twice = twice if member.checkpointing is None else member.checkpointing
        key = (str(peft_config), member.batch, twice)
        if key not in known:
            known[key] = estimate(model, peft_config, config, member.batch, one_copy, twice)
        return known[key]

    return of


def _own_bytes(member: MemoryEstimate) -> int:
    return member.adapter_and_optimizer_bytes


def _together(engine: MemoryEstimate, members: Sequence[MemoryEstimate]) -> MemoryEstimate:
    """The base once, every adapter with its optimizer, and the activations of the one that is at work."""
    activations = [member.activations_bytes for member in members]
    return replace(
        engine,
        adapter_and_optimizer_bytes=sum(map(_own_bytes, members)),
        activations_bytes=None if None in activations else max(size or 0 for size in activations),
    )


def _kv_bytes(model: ModelConfig, members: Sequence[Wanted], config: EngineConfig, at_once: int) -> int:
    """Keys and values of all rows of a round, none of them sharing a prompt; of plain attention in every layer, or 0
    where a model's config names no heads."""
    text: Any = checkpoint_config(model.name, **model.loading).get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = sorted((member.rows * member.batch.length for member in members), reverse=True)
    return 2 * text.num_hidden_layers * heads * width * engine_dtype(config).itemsize * sum(tokens[:at_once])
