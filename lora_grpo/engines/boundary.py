"""The one place where vLLM's exceptions are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_grpo.errors import EngineError, LoraGrpoError


@contextmanager
def vllm_boundary(doing: str, clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """After a failure inside, Ctrl-C included, `clean_up` and raise: our errors as they are, vLLM's as `EngineError`.

    `doing` completes the sentence "vLLM could not ...".
    """
    try:
        yield
    except BaseException as error:
        clean_up()
        if isinstance(error, LoraGrpoError) or not isinstance(error, Exception):
            raise
        raise EngineError(f"vLLM could not {doing}: {type(error).__name__}: {error}") from error
