"""Random state that belongs to one member: what it draws does not depend on who draws in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Generators:
    """The states of torch's, numpy's and Python's generators, which are put in place for a member's turn."""

    def __init__(self) -> None:
        self._own: Any = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        outside = _states()
        if self._own is not None:
            _set(self._own)
        try:
            yield
        finally:
            self._own = _states()
            _set(outside)


def _states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set(states: tuple[Any, ...]) -> None:
    cpu, cuda, numbers, plain = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(numbers)
    random.setstate(plain)
