"""Drives an in-process vLLM a step at a time, in one thread; interrupts and other calls come between two steps."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from lora_grpo.errors import EngineError

_WAITING = (signal.SIGINT, signal.SIGTERM)


class Turn:
    """Every call of an engine takes it. A call from inside another, between two steps, is part of that one's. vLLM that
    is left in the middle of a step does not find out of it again: a signal whose handler is Python's, as Ctrl-C's is,
    is handled between two steps; a second one meanwhile at once, and the engine has to be started again."""

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
            raise EngineError(
                f"{doing} was called in thread {threading.current_thread().name!r} while {self._holder}: only one "
                "thread at a time may use an engine; call it from one thread, or put your own lock around each call"
            )
        outer = self._holder
        try:
            if self._torn and not outer and not last:
                raise EngineError("interrupted twice, so in the middle of a step: close this engine, start another")
            self._holder = outer or f"thread {threading.current_thread().name!r} is in {doing}"
            with nullcontext() if outer else self._interrupts_waiting():
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
        if threading.current_thread() is not threading.main_thread():
            yield
            return
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
            return self._finish([one.partition("-")[0] for one in added])
        finally:
            self.answering -= named

    def _finish(self, ids: list[str]) -> list[Any]:
        missing = set(ids)
        while missing:
            if self.between_steps is not None:
                self.between_steps()
            missing.difference_update(self._finished)
            if missing and not self._llm.llm_engine.has_unfinished_requests():
                raise EngineError(f"vLLM answered {len(ids) - len(missing)} of {len(ids)} requests")
            if missing:
                self._step()
                missing.difference_update(self._finished)
        return [self._finished.pop(one) for one in ids]

    def drain(self) -> None:
        while self._llm.llm_engine.has_unfinished_requests():
            self._step()

    def forget(self) -> None:
        self._finished.clear()

    def _step(self) -> None:
        self._turn.between_steps()
        outputs = self._llm.llm_engine.step()
        self._finished.update((output.request_id, output) for output in outputs if output.finished)
