"""The `vllm.LLM`s in this process: how they share it, are stepped in one thread, fail, and end.

vLLM makes its groups out of the process group that it finds: with one engine in every process, built at the same time,
each gets groups of one process and generates on its own. An engine in some of them only waits for the others for ever;
one built before the trainer's group leaves a group of one, which a trainer would take for its own, and train alone."""

import importlib
import os
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.compat.patching import replaced
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError

_WAITING = (signal.SIGINT, signal.SIGTERM)
_alive: set[int] = set()
_joined = False
"""Whether the process group that engines are in is a trainer's, which they leave as it is."""


class Turn:
    """Every call of an engine takes it. A call from inside another, between two steps, is part of that one's. vLLM that
    is left in the middle of a step does not find out of it again: a signal whose handler is Python's, as Ctrl-C's is,
    is handled between two steps; a second one that comes meanwhile at once, and the engine has to be started again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder = ""
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        self._pending: list[int] = []
        self._torn = False

    @contextmanager
    def take(self, doing: str, *, last: bool = False) -> Iterator[None]:
        """Raises `EngineError` while another thread has it, or, unless it is the `last`, after a step was torn."""
        if not self._lock.acquire(blocking=False):
            said = f"{doing} was called in thread {threading.current_thread().name!r} while {self._holder}"
            raise EngineError(f"{said}: only one thread at a time may use an engine; put a lock around each call")
        outer = self._holder
        try:
            if self._torn and not outer and not last:
                raise EngineError("interrupted twice, so in the middle of a step: close this engine, start another")
            self._holder = outer or f"thread {threading.current_thread().name!r} is in {doing}"
            signalled = threading.current_thread() is threading.main_thread() and not outer
            with self._interrupts_waiting() if signalled else nullcontext():
                yield
        finally:
            self._holder = outer
            self._lock.release()

    def between_steps(self) -> None:
        """Handle the signals that came since the last step, as their handlers do; Ctrl-C raises here."""
        while self._pending:
            number = self._pending.pop(0)
            self._handlers[number](number, None)

    @contextmanager
    def _interrupts_waiting(self) -> Iterator[None]:
        found = {number: signal.getsignal(number) for number in _WAITING}
        self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        try:
            for number in self._handlers:
                signal.signal(number, self._came)
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self.between_steps()

    def _came(self, number: int, frame: Any) -> None:
        if number in self._pending:
            self._torn = True
            self._handlers[number](number, frame)
        else:
            self._pending.append(number)


class StepDriver:
    """Runs requests to their end. Another run may begin and end between two steps of one: each gets its own outputs."""

    def __init__(self, llm: Any, turn: Turn) -> None:
        self._llm, self._turn = llm, turn
        self._finished: dict[str, Any] = {}
        self.answering: Counter[int] = Counter()
        """LoRA ids that unfinished runs name: they must keep their slots."""
        self.between_steps: Callable[[], None] | None = None
        """Called before each step of vLLM; whatever it asks of the engine is done before the rollout goes on."""

    def run(self, asked: Sequence[tuple[Sequence[int], Any, object]], lora_requests: Sequence[Any]) -> list[Any]:
        """vLLM's outputs for (token ids, parameters, version). Raises what vLLM or `between_steps` raises, and
        `EngineError` for lost requests; the caller aborts what is left."""
        prompts = [{"prompt_token_ids": list(ids)} for ids, _, _ in asked]
        params = [one for _, one, _ in asked]
        named = Counter({request.lora_int_id for request in lora_requests if request is not None})
        self.answering += named
        try:
            added = self._llm.enqueue(prompts, params, lora_request=lora_requests, use_tqdm=False)
            # vLLM gives back ids with random characters after a dash; outputs carry them without.
            ids = [one.partition("-")[0] for one in added]
            while not set(ids) <= self._finished.keys():
                if self.between_steps is not None:
                    self.between_steps()
                if self._llm.llm_engine.has_unfinished_requests():
                    self._step()
                elif missing := set(ids) - self._finished.keys():
                    raise EngineError(f"vLLM answered {len(ids) - len(missing)} of {len(ids)} requests")
            return [self._finished.pop(one) for one in ids]
        finally:
            self.answering -= named

    def drain(self) -> None:
        while self._llm.llm_engine.has_unfinished_requests():
            self._step()

    def abort(self) -> None:
        """Drop every unfinished request, and the prefix cache with what they put into it. After an exception in a step
        vLLM keeps the requests scheduled, and its next `generate` would spin on them forever. It caches a prompt's
        blocks before their keys and values are computed (vllm#50283): the same prompt would get unwritten memory."""
        engine = self._llm.llm_engine
        self._finished.clear()
        if leftovers := list(engine.output_processor.request_states):
            engine.abort_request(leftovers, internal=True)
        # Have the V1 runner begin anew: a step that failed between its two halves, or before it took note of the
        # requests that were done, leaves a state that the next one refuses, and rows of adapters that nobody asks for.
        runner = compat.runner(self._llm)
        if hasattr(runner, "execute_model_state"):
            runner.execute_model_state = None
        engine.engine_core.engine_core.scheduler.finished_req_ids.update(getattr(runner, "requests", ()))
        if engine.reset_prefix_cache() is False:
            raise EngineError("vLLM keeps cache blocks of failed requests; close this engine and start another")

    def _step(self) -> None:
        self._turn.between_steps()
        outputs = self._llm.llm_engine.step()
        self._finished.update((output.request_id, output) for output in outputs if output.finished)


def join(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for the process group that there is when an engine starts: a trainer's is joined. Raises
    `ConfigError` for an engine over several devices, and where the trainer's process group is still missing."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if arguments.get(name, 1) != 1:
            said = f"{name}={arguments[name]}: an engine in the trainer's process holds one whole model on one device"
            raise ConfigError(f"{said}; serve larger ones with `vllm serve`, and use VLLMServerEngine")
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
    """Count it as alive until what is returned is first called, which stops it, as does dropping its `owner`."""
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
        raise ConfigError(f"{level_2} has no way back: it cannot read the base again; use level 1, or vLLM >= 0.28")
    # The slots lie in the weights' pool up to 0.32, and count as active afterwards; from 0.33 in one that always stays.
    if level == 2 and loaded and release < (0, 33):
        lost = ", ".join(map(str, loaded))
        raise ConfigError(f"{level_2} discards the adapter slots ({lost} loaded); use level 1, or unload all versions")


@contextmanager
def vllm_boundary(doing: str, clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """After a failure inside, also Ctrl-C, `clean_up` and raise: our errors as they are, vLLM's as `EngineError`."""
    try:
        yield
    except BaseException as error:
        clean_up()
        if isinstance(error, LoraGrpoError) or not isinstance(error, Exception):
            raise
        raise EngineError(f"vLLM could not {doing}: {type(error).__name__}: {error}") from error


def shutdown(llm: Any, *, last: bool) -> None:
    """Stop an in-process engine; with `last`, tear down the process-wide parallel state too. vLLM 0.32 does
    that always, also when an engine is collected: other engines, or a trainer in the group, could not go on."""
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
