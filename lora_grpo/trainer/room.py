"""What an engine is started for, of one run or of a population, and how many of its members memory holds."""

import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, Self

import psutil
import torch
from peft import LoraConfig
from torch import nn

from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.compat import allowed_rank
from lora_grpo.engines.local.targets import check_whole
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import base_dtype
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.trainer import models
from lora_grpo.trainer.memory import ADAM_BYTES, LargestBatch, MemoryEstimate, engine_dtype, estimate_memory, mib
from lora_grpo.trainer.models import Model, Sharing, build_engine, checkpoint_of, default_device, lora_rank


@dataclass(frozen=True)
class Wanted:
    """What one member of a population needs room for; a run that is none is a member too, the only one."""

    peft_config: Any
    config: GRPOConfig
    prompt_tokens: int  # of the longest prompt

    @property
    def batch(self) -> LargestBatch:
        # A budget of tokens counts a shared prompt once, and is filled with rows of other groups then. On a GPU there
        # is one where none is set: what this many rows take that share nothing.
        rows, completion_tokens = self.config.per_device_train_batch_size, self.config.max_completion_length
        if self.config.max_tokens_per_micro_batch is not None:
            rows = max(1, self.config.max_tokens_per_micro_batch // (self.prompt_tokens + completion_tokens))
        elif default_device().type == "cpu":
            return LargestBatch(rows, self.prompt_tokens, completion_tokens, self.config.num_generations)
        return LargestBatch(rows, self.prompt_tokens, completion_tokens)


@dataclass(frozen=True)
class Room:
    engine_config: EngineConfig
    rank: int  # the largest
    leaves: list[str] | None  # of all members; None: all linear layers
    version_bytes: int  # of the tensors of a version, the largest member's
    members: int  # at a time
    memory: MemoryEstimate  # of those
    fit: int  # how many members memory holds, the largest first
    checkpointing: bool  # whether activations are computed twice, for members that leave it open

    def __str__(self) -> str:
        said = str(self.memory) if self.members == 1 else f"{self.members} members take {self.memory}"
        return said + (", activations computed twice" if self.checkpointing else "")

    def start(self, model: Model, sharing: Sharing) -> Engine:
        return build_engine(model, self.engine_config, self.leaves, share=sharing is True)

    def require(self) -> Self:
        """Raises `ConfigError`, with what helps, where memory is too small for so many."""
        if self.fit < self.members:
            device = default_device()
            free = f"{device} has {mib(available_memory(device))} free"
            if self.members == 1:
                fix = self.memory.what_helps()
                raise ConfigError(f"the run needs {self.memory}, and {free}: {fix}, or use a smaller model")
            others = f"pass at_once={self.fit}, so that the others wait" if self.fit else "use a smaller model"
            fixes = f"{others}, or give them smaller adapters or micro-batches"
            raise ConfigError(f"{self}, and {free}, which holds {self.fit} of them: {fixes}")
        return self

    def check(self, model: ModelConfig, peft_config: Any, engine: Engine) -> None:
        """Raises `ConfigError` for an adapter that the engine was not started for."""
        rank, leaves = lora_rank(model, peft_config), models.adapted_leaves(model, peft_config)
        told = "the population's engine was started for"
        if rank > (most := engine.max_lora_rank):
            raise ConfigError(f"rank {rank}: {told} ranks up to {most}; give a member of that rank at the start")
        if self.leaves is not None and (leaves is None or not {*leaves} <= {*self.leaves}):
            named = f"target_modules={peft_config.target_modules!r}: {told} {', '.join(self.leaves)}"
            raise ConfigError(f"{named}; give a member with those layers at the start")


def plan_room(
    model: Model, members: list[Wanted], config: EngineConfig, sharing: Sharing, at_once: int, *, starts: bool = True
) -> Room:
    """The room for `at_once` of the members, whichever they are; unless it `starts` one, an engine is there. Raises
    `ConfigError` for a base or an adapter that cannot be."""
    if starts or isinstance(model, ModelConfig):
        check_whole(checkpoint_of(model).name)
    rank = max(lora_rank(model, member.peft_config) for member in members)
    adapted = [models.adapted_leaves(model, member.peft_config) for member in members]
    leaves = None if None in adapted else sorted({leaf for own in adapted for leaf in own or ()})
    # Servers hold as many versions as there are slots: the one that is published beside the others needs a place too.
    # So do those that may be published while a rollout goes on.
    slots = max(config.max_loras, at_once + bool(config.urls), *(1 + one.config.max_staleness for one in members))
    most = max(rank, config.max_lora_rank or 0)
    sized: EngineConfig = config.replace(max_loras=slots, max_lora_rank=most)
    if starts:  # what an engine would refuse
        if not config.urls:
            allowed_rank(most)
        if models.quantization_of(checkpoint_of(model)) is not None and sharing is True:
            raise ConfigError("share_base_weights=True: quantized weights cannot be the trainer's too; leave it out")
    one_copy, served = models.expects_one_copy(sharing, model, config), sized if starts else None
    joint = members[0].peft_config if len(members) == 1 else LoraConfig(r=1, target_modules=leaves or "all-linear")
    adapters = {str(adapter): adapter for adapter in (joint, *(member.peft_config for member in members))}
    asked = [member.config.gradient_checkpointing for member in members]

    @cache
    def estimated(adapter: str, batch: LargestBatch, twice: bool) -> MemoryEstimate:
        return estimate(model, adapters[adapter], served, batch, one_copy, twice)

    def room(*, twice: bool) -> Room:
        remade = [twice if own is None else own for own in asked]
        each = [estimated(str(one.peft_config), one.batch, own) for one, own in zip(members, remade, strict=True)]
        each.sort(key=attrgetter("adapter_and_optimizer_bytes"), reverse=True)
        activations = [one.activations_bytes for one in each[:at_once]]
        # The base once, every adapter with its optimizer, and the activations of the one that is at work.
        memory = replace(
            estimated(str(joint), members[0].batch, remade[0]),
            adapter_and_optimizer_bytes=sum(one.adapter_and_optimizer_bytes for one in each[:at_once]),
            activations_bytes=None if None in activations else max(size or 0 for size in activations),
        )
        slot_bytes = memory.adapter_slots_bytes // slots
        fixed_bytes = memory.total_bytes - memory.adapter_and_optimizer_bytes - slot_bytes * at_once
        totals_bytes = accumulate((one.adapter_and_optimizer_bytes + slot_bytes for one in each), initial=fixed_bytes)
        fit = sum(total <= available_memory(default_device()) for total in totals_bytes) - 1
        of_version = each[0].adapter_and_optimizer_bytes // ADAM_BYTES * engine_dtype(config).itemsize
        return Room(sized, rank, leaves, of_version, at_once, memory, max(0, fit), twice)

    found = room(twice=all(asked))
    return room(twice=True) if found.fit < at_once and None in asked else found


def estimate(
    model: Model, peft_config: Any, config: EngineConfig | None, batch: LargestBatch, one_copy: bool, twice: bool
) -> MemoryEstimate:
    """What a run takes; without a `config`, the engine is there already."""
    empty, given = models.without_memory(model, peft_config), isinstance(model, nn.Module)
    dtype = base_dtype(model) if isinstance(model, nn.Module) else getattr(torch, model.dtype, None)
    elsewhere = config is None or bool(config.urls)
    scheme = None if elsewhere and given else models.quantization_of(checkpoint_of(model))
    empty.to(dtype or empty.config.dtype or torch.float32)
    own = config or EngineConfig()
    needed = estimate_memory(empty, batch, own, twice, one_copy or given, scheme)
    if elsewhere:
        return replace(needed, engine_base_bytes=0, adapter_slots_bytes=0)
    return replace(needed, kv_bytes=_cache_bytes(own, needed.engine_base_bytes + needed.adapter_slots_bytes))


def available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available


def _cache_bytes(config: EngineConfig, weights_bytes: int) -> int:
    """On CUDA what vLLM leaves of its share beside its weights, on the CPU what it takes for the KV cache alone."""
    if default_device().type == "cuda":
        return max(0, int(torch.cuda.mem_get_info()[1] * config.gpu_memory_utilization) - weights_bytes)
    return int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) << 30
