"""From a run's `keep` settings to the store's rules."""

from __future__ import annotations

from collections.abc import Callable

from lora_grpo.adapters.upkeep.retention import Retention, keep_archived, keep_best, keep_latest, keep_trainer_state
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import KeepConfig


def retention(keep: KeepConfig) -> Retention:
    """The store's policy for a run's settings; what a guard goes back to and what "best" names stay exact."""
    rules = keep_latest(keep.on_tmpfs)
    best = keep_best("reward") | keep_best("eval/reward")
    rules |= keep_trainer_state(keep_latest(keep.trainer_states) | best)
    if keep.archived is not None:
        archived = keep_latest(keep.archived) | keep_best("reward", keep.archived) | keep_best("eval/reward", 3)
        rules |= keep_archived(archived)
    return rules


def keeps_state(keep: KeepConfig) -> Callable[[AdapterVersion], bool]:
    """Which versions' trainer states are written at all."""
    return lambda version: version.step % keep.trainer_state_every == 0
