"""The `vllm.LLM`s in this process: how they share it, fail (the one place where vLLM's exceptions are caught), and end.

vLLM makes its groups out of the process group that it finds: with one engine in every process, built by all at the same
time, each gets groups of one process and generates on its own. An engine in some of them only waits for the others for
ever; one that is built before the trainer's group leaves a group of one process behind, which a trainer would take for
its own, and train alone.
"""

import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.patching import replaced
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError

_alive: set[int] = set()
_joined = False
"""Whether the process group that engines are in is a trainer's, which they leave as it is."""


def join(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for the process group that there is when an engine starts: a trainer's is joined. Raises
    `ConfigError` for an engine over several devices, and where the trainer's process group is still missing."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if arguments.get(name, 1) != 1:
            raise ConfigError(
                f"{name}={arguments[name]}: an engine in the trainer's process holds one whole model on one device; "
                "serve larger ones with `vllm serve`, and use VLLMServerEngine"
            )
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if launched > 1 and not torch.distributed.is_initialized():
        raise ConfigError(f"one of {launched} processes that are not connected yet: build accelerate's Accelerator()")
    global _joined
    if not _alive:
        _joined = torch.distributed.is_initialized()
    if not _joined or torch.distributed.get_world_size() == 1:
        return dict(arguments)
    # Takes the process's own device, where vLLM would take the first one.
    return {"distributed_executor_backend": "external_launcher", **arguments}


def hold(llm: Any, owner: object) -> Callable[[], object]:
    """Count it among the engines of this process until what is returned is called, which stops it, or its `owner` is
    dropped without that, as by a notebook's cell that is run again."""
    _alive.add(id(llm))
    stopping = weakref.finalize(owner, let_go, llm)
    stopping.atexit = False
    return stopping


def let_go(llm: Any) -> None:
    _alive.discard(id(llm))
    shutdown(llm, last=not _alive)


def engines_alive() -> int:
    return len(_alive)


def check_may_sleep(llm: Any, level: int, loaded: Sequence[AdapterVersion], *, shared: bool) -> None:
    """Raises `ConfigError` with what stands against it; `shared`: a trainer's base is a view of the engine's weights.
    Level 1 keeps the weights in host memory, adapter slots included; level 2 reads the base from its files again."""
    if level not in (1, 2):
        raise ConfigError(f"there is no sleep level {level}: use 1 (weights go to host memory) or 2 (read again)")
    if shared:
        raise ConfigError("sleep would free the weights that the trainer shares; start with share_base_weights=False")
    if not llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
        raise ConfigError("the engine was not started with enable_sleep_mode=True (GPUs only), so it cannot sleep")
    if llm.llm_engine.has_unfinished_requests():
        raise ConfigError("the engine is answering requests, and sleep would abort them; sleep when they are done")
    if (alive := engines_alive()) > 1:
        raise ConfigError(f"{alive} engines are alive in this process, and vLLM would unmap all; close the others")
    release = compat.vllm_release()
    level_2 = f"sleep level 2 on vLLM {release[0]}.{release[1]}"
    # `reload_weights` meets the wrapped layers up to 0.27, whose weights have other names than the files', and raises.
    if level == 2 and release < (0, 28):
        why = "has no way back: it cannot read the base of an engine with LoRA again"
        raise ConfigError(f"{level_2} {why}; use level 1, or vLLM 0.28 or newer")
    # The slots lie in the weights' pool up to 0.32, and count as active afterwards; from 0.33 in one that always stays.
    if level == 2 and loaded and release < (0, 33):
        lost = ", ".join(map(str, loaded))
        raise ConfigError(f"{level_2} discards the adapter slots ({lost} loaded); use level 1, or unload all versions")


@contextmanager
def vllm_boundary(doing: str, clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """After a failure inside, Ctrl-C included, `clean_up` and raise: our errors as they are, vLLM's as `EngineError`.
    `doing` completes the sentence "vLLM could not ..."."""
    try:
        yield
    except BaseException as error:
        clean_up()
        if isinstance(error, LoraGrpoError) or not isinstance(error, Exception):
            raise
        raise EngineError(f"vLLM could not {doing}: {type(error).__name__}: {error}") from error


def abort_everything(llm: Any) -> None:
    """Drop every unfinished request, and the prefix cache with what they put into it. After an exception in a step vLLM
    keeps the requests scheduled, and its next `generate` would spin on them forever. It enters a prompt's blocks into
    the prefix cache when it schedules them, before their keys and values are computed (vllm#50283): the same prompt
    would then be answered from memory that nothing was written to."""
    engine = llm.llm_engine
    leftovers = list(engine.output_processor.request_states)
    if leftovers:
        engine.abort_request(leftovers, internal=True)
    # Have the V1 runner begin anew: a step that failed between its two halves, or before it took note of the requests
    # that were done, leaves a state that the next one refuses, and rows of adapters that nobody asks for any more.
    v1_runner = compat.runner(llm)
    if hasattr(v1_runner, "execute_model_state"):
        v1_runner.execute_model_state = None
    engine.engine_core.engine_core.scheduler.finished_req_ids.update(getattr(v1_runner, "requests", ()))
    if engine.reset_prefix_cache() is False:
        raise EngineError("vLLM keeps cache blocks of failed requests; close this engine and start another")


def shutdown(llm: Any, *, last: bool) -> None:
    """Stop an in-process engine; with `last`, tear down the process-wide parallel state too. What vLLM 0.32 does by
    itself, also when an engine is collected, tears that down always: other engines could not take another step, and a
    trainer whose process group was joined could not either."""
    client = llm.llm_engine.engine_core
    if last:
        _forget_addresses()
    if last and not _joined:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        client.shutdown()
        # 0.32 has done it by then, and looking for garbage once more takes longer than all else here.
        if torch.distributed.is_initialized():
            cleanup_dist_env_and_memory()
    else:
        if finalizer := getattr(client, "_finalizer", None):
            finalizer.detach()
        core = client.engine_core
        core.structured_output_manager.clear_backend()
        # 0.33's executor in a joined group ends vllm's own groups, which other engines may be in.
        state: Any = importlib.import_module("vllm.distributed.parallel_state")
        with replaced(state, destroy_model_parallel=lambda: None):
            core.model_executor.shutdown()
        core.scheduler.shutdown()
        if last:
            # vLLM's own groups go, and the process group that they were made of stays.
            state.destroy_model_parallel()
            if state._WORLD is not None:
                state._WORLD.destroy()
            state._WORLD = state._NODE_COUNT = None


def _forget_addresses() -> None:
    """What vLLM's GPU LoRA kernels remember of slots by their address alone, for the whole process: the slots of the
    next engine may lie there in other shapes, and those of this one could not be freed."""
    kernels = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(kernels, name, {}).clear()
