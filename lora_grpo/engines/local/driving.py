"""Drives an in-process vLLM a step at a time, so that other things can be done between two steps of a rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lora_grpo.engines.local.turn import Turn
from lora_grpo.errors import EngineError


class StepDriver:
    """Runs requests to their end. Another run may begin and end between two steps of one: each gets its own outputs."""

    def __init__(self, llm: Any, turn: Turn) -> None:
        self._llm, self._turn = llm, turn
        self._finished: dict[str, Any] = {}
        self.answering: Counter[int] = Counter()
        """LoRA ids that unfinished runs name: they must keep their slots."""
        self.between_steps: Callable[[], None] | None = None
        """Called before each step of vLLM; whatever it asks of the engine is done before the rollout goes on."""

    def run(self, prompts: Sequence[Any], params: Sequence[Any], lora_requests: Sequence[Any]) -> list[Any]:
        """vLLM's outputs in the order of the prompts.

        Raises what vLLM or `between_steps` raises, and `EngineError` for lost requests; the caller aborts what is left.
        """
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
