"""vLLM's V1 model runner on the CPU: requests with seeds whose prompts are computed in several steps.

Each such step draws a token that is thrown away, and the runner then sets the request's generator back by CUDA's
`set_offset`, which a CPU generator does not have. Here it is set to the state it had, so that a seed gives the same
tokens however its prompt was cut.
"""

from __future__ import annotations

from typing import Any


def keep_seeds(runner: type[Any]) -> None:
    """Mend vLLM's `CPUModelRunner`. One with other methods, which a release may have, is left alone."""
    stock_sample, stock_bookkeeping = (getattr(runner, name, None) for name in ("_sample", "_bookkeeping_sync"))
    if stock_sample is None or stock_bookkeeping is None or getattr(stock_sample, "keeps_seeds", False):
        return

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        before = {row: generators[row].get_state() for row in map(int, unfinished) if row in generators}
        sampled = stock_sample(self, *args, **kwargs)
        for row, state in before.items():
            generators[row].set_state(state)
        return sampled

    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return stock_bookkeeping(self, *args, **kwargs)
        finally:
            batch.generators = generators

    sample.keeps_seeds = True  # type: ignore[attr-defined]
    runner._sample, runner._bookkeeping_sync = sample, bookkeeping
