"""Starts vLLM in this process with LoRA on: what must be in place before, and what vLLM does otherwise meanwhile.

On the CPU vLLM compiles a model, and computes a mixture's experts, but not with LoRA: its own LoRA path cannot be
traced. Ours is one operator to the compiler."""

import importlib
import os
import sysconfig
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from lora_grpo.engines import compat
from lora_grpo.engines.compat.patching import replaced
from lora_grpo.engines.local import lora_kernels
from lora_grpo.engines.local.running import join, vllm_boundary
from lora_grpo.engines.local.targets import serving_arguments
from lora_grpo.engines.local.weights import check_shareable, plain_cpu_weights
from lora_grpo.errors import ConfigError
from lora_grpo.kernels import library
from lora_grpo.state import generators_kept


def adapter_room(max_loras: int, max_cpu_loras: int | None) -> int:
    """How many versions stay loaded: two more than slots by default."""
    room = max_loras + 2 if max_cpu_loras is None else max_cpu_loras
    if not 1 <= max_loras <= room:
        raise ConfigError(f"max_loras={max_loras} must be between 1 and max_cpu_loras={room}")
    if room < 2:
        raise ConfigError("max_cpu_loras=1: a version that fails to load would push out the served one; set at least 2")
    return room


def start_llm(
    model: str | Path, code: dict[str, Any], layers: Any, asked: dict[str, Any], kernels: bool, share: bool
) -> tuple[Any, bool]:
    """A `vllm.LLM` with LoRA on `layers`, and whether its kernels leave base rows alone beside adapter rows."""
    vllm = compat.import_vllm()
    arguments = join(serving_arguments(str(model), asked.pop("quantization", None), layers or (), **code) | asked)
    if arguments.get("enable_sleep_mode") and compat.is_cpu():
        raise ConfigError("enable_sleep_mode=True: vLLM sleeps on GPUs only, but here it runs on the CPU; leave it out")
    if share:
        check_shareable(arguments)
    # Ours need slots and activations of one dtype; vLLM's own convert.
    one_dtype = arguments.get("lora_dtype") in (None, "auto", arguments.get("dtype"))
    kernels = kernels and lora_kernels.applies() and one_dtype
    compiles = kernels and not share and not arguments.get("enforce_eager") and can_compile()
    if compiles:
        # Part of the key of vLLM's compile cache, which looks a model up by its config before it traces anything, and
        # would find one with other kernels.
        arguments["additional_config"] = {**(arguments.get("additional_config") or {}), "lora_grpo": "add_cpu_lora"}
    elif compat.is_cpu():
        # Not told so, vLLM leaves its fused operators to the compiler, and then calls none with LoRA.
        arguments["enforce_eager"] = True
    make_expert_group()
    with (
        vllm_boundary(f"start on {model}"),
        # vLLM seeds them all with 0: a program that was seeded before would draw the same with every seed.
        generators_kept(),
        plain_cpu_weights() if share and compat.is_cpu() else nullcontext(),
        lora_kernels.products_by_segment() if kernels else nullcontext(),
        compiled_with_lora() if compiles else nullcontext(),
        experts_without_lora() if compat.is_cpu() else nullcontext(),
        classes_kept(),
    ):
        arguments |= {"enable_lora": True, "logprobs_mode": "processed_logprobs"}
        llm = vllm.LLM(model=str(model), **code, **arguments)
    return llm, kernels or compat.base_rows_are_safe()


def can_compile() -> bool:
    """Whether there is what compiled code is built with, and where vLLM keeps it; a warning says what is missing."""
    if library() is None:
        return False  # and said why
    if obstacle := _obstacle():
        said = f"models with LoRA are not compiled on this CPU, so decoding is slower: {obstacle}"
        warnings.warn(said, RuntimeWarning, stacklevel=3)
    return obstacle is None


def _obstacle() -> str | None:
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from vllm import envs

    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing; install them (python3-dev)"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"PyTorch finds no program that is called {config.cpp.cxx[-1]!r}; have CXX name one, without arguments"
    cache = Path(envs.VLLM_CACHE_ROOT)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"vLLM cannot keep compiled code in {cache} ({error.strerror}); set VLLM_CACHE_ROOT"
    return None if os.access(cache, os.W_OK) else f"vLLM may not write to {cache}; set VLLM_CACHE_ROOT"


def compiled_with_lora() -> AbstractContextManager[None]:
    """CPU engines that are configured within are compiled as if they had no LoRA, unless told to be eager."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        with replaced(config, lora_config=None):
            stock(cls, config)

    return replaced(platform, check_and_update_config=classmethod(check_and_update_config))


def experts_without_lora() -> AbstractContextManager[None]:
    """Models built within compute experts as without LoRA: kernels that could add it to them do not exist for CPUs."""
    layer = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    stock = layer.FusedMoEConfig
    return replaced(layer, FusedMoEConfig=lambda **settings: stock(**{**settings, "is_lora_enabled": False}))


def make_expert_group() -> None:
    """Let an engine with experts start beside one without: vLLM makes process groups with its first engine alone."""
    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    if not state.model_parallel_is_initialized() or state._EP is not None or torch.distributed.get_world_size() > 1:
        return
    world = state.get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    state._EP = state.init_model_parallel_group([world.ranks], world.local_rank, backend, group_name="ep")


def classes_kept() -> AbstractContextManager[None]:
    """Engines that start within leave transformers' classes as they are. Of a model that it has no class for, vLLM
    changes transformers' class, so that a trainer's could not be called any more; here it changes a subclass."""
    backend = importlib.import_module("vllm.model_executor.models.transformers.base").Base
    decorate, build = backend._decorate_cls_for_torch_compile, backend.__init__
    wanted: dict[int, list[tuple[type, dict[str, Any]]]] = {}

    def note(self: Any, cls: type, **settings: Any) -> None:
        wanted.setdefault(id(self), []).append((cls, settings))

    def build_and_decorate(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for cls, settings in wanted.pop(id(self), ()):
            own = _subclass(cls)
            decorate(self, own, **settings)
            for module in self.model.modules():
                if type(module) is cls:
                    module.__class__ = own
                    # All that is left of its constructor is the compiler's part.
                    own.__init__(module)

    return replaced(backend, _decorate_cls_for_torch_compile=note, __init__=build_and_decorate)


def _subclass(cls: Any) -> Any:
    """A class of the same name that builds nothing; its `forward` is a function of its own, whose code vLLM swaps."""
    theirs = cls.forward
    code = theirs.__code__.replace()
    forward = FunctionType(code, theirs.__globals__, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    forward.__dict__.update(theirs.__dict__)
    for copied in ("__kwdefaults__", "__annotations__", "__qualname__", "__module__", "__doc__"):
        setattr(forward, copied, getattr(theirs, copied))
    body = {"__init__": lambda self: None, "forward": forward, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), {**body, "__qualname__": cls.__qualname__})
