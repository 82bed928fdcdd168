"""The order in which a run uses its prompts: shuffled epochs that resume exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lora_grpo.errors import ConfigError
from lora_grpo.types import derive_seed


class PromptSampler:
    """Indices of P prompts a step, in epochs that are shuffled anew and hold every prompt exactly once.

    The order depends on `seed` and the epoch alone, on every machine, and the whole state is `(epoch, offset)`, so a
    resumed run draws what the uninterrupted one would have. A step that reaches an epoch's end goes on in the next.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int) -> None:
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.epoch = 0
        self.offset = 0
        self._order = self._shuffled(0)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The indices of the next step's prompts; never ends."""
        indices: list[int] = []
        while len(indices) < self.prompts_per_step:
            taken = self._order[self.offset : self.offset + self.prompts_per_step - len(indices)]
            indices.extend(taken)
            self.offset += len(taken)
            if self.offset == self.num_prompts:
                self._move_to(self.epoch + 1, 0)
        return indices

    def state_dict(self) -> dict[str, int]:
        """Where it stands, as plain numbers."""
        return {"epoch": self.epoch, "offset": self.offset, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`; refuses one of another dataset size or seed, whose order would be another."""
        saved, here = (state["num_prompts"], state["seed"]), (self.num_prompts, self.seed)
        if saved != here:
            raise ConfigError(
                f"cannot resume the prompts: the saved run had (num_prompts, seed) = {saved}, this one has {here}; "
                "resume with the data and seed of the saved run"
            )
        self._move_to(state["epoch"], state["offset"])

    def _move_to(self, epoch: int, offset: int) -> None:
        if epoch != self.epoch:
            self._order = self._shuffled(epoch)
        self.epoch, self.offset = epoch, offset

    def _shuffled(self, epoch: int) -> list[int]:
        # Raw words of a bit generator are fixed by NumPy's compatibility policy; `Generator.permutation` is not.
        keys = np.random.PCG64(derive_seed(self.seed, epoch)).random_raw(self.num_prompts)
        order: list[int] = np.argsort(keys, kind="stable").tolist()
        return order
