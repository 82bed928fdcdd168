"""An engine that one thread owns: what other threads ask of it is done there, between two of its steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine
from lora_grpo.worker import Worker


def _done(name: str) -> Any:
    """The engine's method of that name, done by the worker."""

    def method(self: OwnedEngine, *given: Any, **named: Any) -> Any:
        def noting() -> Any:
            try:
                return getattr(self._engine, name)(*given, **named)
            finally:
                self._loaded = self._engine.loaded()

        return self.worker.call(noting)

    return method


class OwnedEngine:
    """An engine that steps, for use from any thread. `worker` owns it: rollouts are its jobs, all else its calls.

    An engine that steps computes in the thread that calls it, and only one thread may use it. It calls `between_steps`,
    where that is set, before each of its steps; its other methods may be called from inside.

    A load waits for one engine step at most, not for the rollout. After a step that never ended, the engine holds
    nothing that anyone could ask for, and it is left as it is until the process ends.
    """

    def __init__(self, engine: Any, worker: Worker) -> None:
        self.worker, self._engine = worker, engine
        self.proof, self.device = engine.proof, engine.device
        self.max_lora_rank, self.lora_dtype = engine.max_lora_rank, engine.lora_dtype
        self._loaded = engine.loaded()
        engine.between_steps = worker.poll
        if self.device is not None and self.device.type == "cuda":
            # A new thread's current device is the first one.
            worker.call(partial(torch.cuda.set_device, self.device))

    def __getattr__(self, name: str) -> Any:
        """What only some engines offer, such as `tokenizer`; not for use while the thread is at work."""
        return getattr(self._engine, name)

    load, unload, generate, logprobs = _done("load"), _done("unload"), _done("generate"), _done("logprobs")
    describe_base, read_base = _done("describe_base"), _done("read_base")

    def loaded(self) -> tuple[AdapterVersion, ...]:
        """As after the last call that ended, without waiting for the thread."""
        return () if self.worker.hangs else self._loaded

    def release(self) -> bool:
        """End the thread: the engine is again its caller's alone. False when it hangs in a step."""
        self.worker.end()
        ended = self.worker.join()
        if ended:
            self._engine.between_steps = None
        return ended

    def close(self) -> None:
        if self.release():
            self._engine.close()


def owned(engine: Engine, patience_s: float) -> Engine:
    """`engine` for use from several threads: one that steps gets a thread that owns it, any other is left alone."""
    steps = hasattr(engine, "between_steps")
    return OwnedEngine(engine, Worker("generator", patience_s=patience_s)) if steps else engine
