"""Functions of others in our hands, while a block runs or for good: so is mended what vLLM's releases have wrong."""

import ctypes
import errno
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_grpo.errors import UnsupportedVersion

HOPPER = (9, 0)
_KERNEL = "vllm.lora.ops.triton_ops.lora_expand_op"
_WHOLE = {"Glm4ForCausalLM": ("gate_up_proj",)}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # on x86-64, the only machine with tiles
_MARK = "lora_grpo_wrapped"


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper` called in place of `owner.name`, which it is given first, if there is such a name; done once."""
    stock: Any = getattr(owner, name, None)
    if stock is not None and not hasattr(stock, _MARK):

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(stock, *args, **kwargs)

        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Meanwhile, a module, class or object has these values by these names, its own or inherited."""
    own = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)
        for name, value in own.items():
            setattr(owner, name, value)


# What releases have wrong


def kernel_is_mended() -> bool:
    return hasattr(getattr(importlib.import_module(_KERNEL), "get_lora_op_configs", None), _MARK)


def mend_kernels(release: tuple[int, int], capability: tuple[int, int] | None) -> None:
    """On Hopper vLLM's LoRA expand kernel of one slice gives NaN with two pipeline stages (vllm#48590, triton#9433):
    run it with one, as vLLM 0.33 does. Raises `UnsupportedVersion` where the kernel's module is not what was read."""
    if capability != HOPPER or release >= (0, 33):
        return
    kernel = importlib.import_module(_KERNEL)
    if not hasattr(kernel, "get_lora_op_configs") or not hasattr(kernel, "_lora_expand_kernel"):
        said = f"vLLM {release[0]}.{release[1]}'s LoRA kernel gives NaN on Hopper GPUs (vllm#48590) and cannot be set"
        raise UnsupportedVersion(f"{said} to one pipeline stage here: install 'vllm>=0.33,<0.34'")
    wrap_once(kernel, "get_lora_op_configs", lambda stock, *args, **kwargs: {**stock(*args, **kwargs), "num_stages": 1})


def take_whole() -> None:
    """vLLM takes adapters of layers that a checkpoint holds as one tensor in the only form that PEFT writes. Its loader
    expects a tensor a slice of these classes, and serves the same layer of others whole (Phi-3, GLM-4V)."""

    def mapping(stock: Any, model: Any, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        return {**stock(model, *args, **kwargs), **{name: [name] for name in _WHOLE.get(type(model).__name__, ())}}

    wrap_once(importlib.import_module("vllm.lora.model_manager"), "process_packed_modules_mapping", mapping)


def look_at_models_here() -> None:
    """vLLM looks at a model's class in this process. It would have another one do so, which takes 10 s to import vLLM,
    so that CUDA does not start here; but here it starts anyway."""
    registry = importlib.import_module("vllm.model_executor.models.registry")
    wrap_once(registry, "_run_in_subprocess", lambda _, look: look())


def turn_every_head() -> None:
    """Queries (tokens, heads, head size) take the plain form of rotary embeddings. Of such a one vLLM's CPU kernel
    turns all heads but the first as if they were another token's: LFM2 and MLA log-probs are .2 to .5 nats wrong."""

    def forward_cpu(stock: Any, self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if (positions.dim(), query.dim()) == (1, 3):
            return self.forward_native(positions, query, key)
        return stock(self, positions, query, key)

    layer = importlib.import_module("vllm.model_executor.layers.rotary_embedding.base").RotaryEmbedding
    wrap_once(layer, "forward_cpu", forward_cpu)


def keep_seeds() -> None:
    """On vLLM's V1 CPU runner a seed gives the same tokens however its prompt was cut into steps. Each such step draws
    a token that is thrown away, and sets the generator back by CUDA's `set_offset`, which a CPU's lacks."""

    def sample(stock: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        before = {row: generators[row].get_state() for row in map(int, unfinished) if row in generators}
        sampled = stock(self, *args, **kwargs)
        for row, state in before.items():
            generators[row].set_state(state)
        return sampled

    def bookkeeping(stock: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        with replaced(self.input_batch, generators={}):
            return stock(self, *args, **kwargs)

    runner = importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    if hasattr(runner, "_sample") and hasattr(runner, "_bookkeeping_sync"):
        wrap_once(runner, "_sample", sample)
        wrap_once(runner, "_bookkeeping_sync", bookkeeping)


def allow_tiles() -> None:
    """Ask the kernel for an Intel processor's AMX tiles; where they are refused, a warning, and vLLM computes without.

    vLLM's CPU attention never asks, and Linux ends such a process with SIGILL (arch_prctl ARCH_REQ_XCOMP_PERM). An exec
    loses the permission, as in vLLM's workers. oneDNN asks, but in vLLM 0.32 only for weights above 1 MiB."""
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    if not (refused := supported() and _syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)):
        return
    # What vLLM itself asks before it chooses a kernel with tiles; oneDNN finds out by itself.
    torch.cpu._is_amx_tile_supported = bool
    why = "a thread's alternative signal stack is too small for them" if refused == errno.ENOSPC else "arch_prctl"
    said = f"this processor has AMX tiles, but the kernel refuses them ({why}: {os.strerror(refused)})"
    fix = "a Linux from 5.16 on, whose sandbox lets arch_prctl through, gives them"
    warnings.warn(f"{said}: vLLM computes without them, more slowly; {fix}", RuntimeWarning, stacklevel=2)


def _syscall(*arguments: int) -> int:
    """0, or the errno it failed with."""
    return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, arguments)) else 0
