"""An engine that starts in one process with others: beside a trainer's model of its class, beside another engine."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from lora_grpo.engines.patching import replaced


def make_expert_group() -> None:
    """Let an engine with experts start beside one without: vLLM makes process groups with its first engine alone."""
    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    if not state.model_parallel_is_initialized() or state._EP is not None or torch.distributed.get_world_size() > 1:
        return
    world = state.get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    state._EP = state.init_model_parallel_group([world.ranks], world.local_rank, backend, group_name="ep")


@contextmanager
def classes_kept() -> Iterator[None]:
    """Engines that start within compile a class of their own, and leave transformers' classes as they are.

    A model that vLLM has no class for is served through transformers' class, and vLLM puts its compiler into that class
    itself: a trainer's model of the same class could neither be built nor called any more, whichever came first.
    """
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

    with replaced(backend, _decorate_cls_for_torch_compile=note, __init__=build_and_decorate):
        yield


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
