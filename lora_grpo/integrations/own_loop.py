"""What a training loop of another maker owes the command line: an answer to `lora-grpo rollback` and its like."""

from __future__ import annotations

from collections.abc import Callable

from lora_grpo.metrics import Reporter
from lora_grpo.rollback import RollbackReport, Target
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.steering import apply_requests


def answer_requests(sync: NativeSync) -> None:
    """Do what `lora-grpo rollback`, `pin`, `unpin` and `prune` ask of the run that `sync`'s store holds.

    Call it before each step, in every process, where nothing sampled from `HEAD` still waits to be trained on. What
    came of a request is told to who asked, on stderr and in RUN/metrics.jsonl; one that fails changes nothing.

    >>> for step in range(2):
    ...     answer_requests(sync)
    ...     version = sync.push(step=step)
    """

    def heard(roll_back: Callable[[Target], RollbackReport]) -> None:
        run = sync.store.archive
        if run is not None and sync.store.requests():
            with Reporter(run, total_steps=0) as reporter:
                apply_requests(sync.store, roll_back, reporter)

    sync.processes.lead(heard, sync.rollback)
