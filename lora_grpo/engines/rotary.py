"""vLLM's CPU kernel of rotary embeddings, kept from queries whose heads have a dimension of their own.

Of such a query (tokens, heads, head size) it turns every head but the first as if it were another token's: LFM2 and
MLA models come out wrong, their log-probs by .2 to .5 nats. vLLM's own plain form of the same layer is right.
"""

from __future__ import annotations

import importlib
from typing import Any


def turn_every_head() -> None:
    """From now on, in this process: such queries take the plain form. A second call does nothing."""
    layer: Any = importlib.import_module("vllm.model_executor.layers.rotary_embedding.base").RotaryEmbedding
    stock = vars(layer).get("forward_cpu")
    if stock is None or hasattr(stock, "stock"):
        return

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        compute = self.forward_native if (positions.dim(), query.dim()) == (1, 3) else stock.__get__(self)
        return compute(positions, query, key)

    forward_cpu.stock = stock  # type: ignore[attr-defined]
    layer.forward_cpu = forward_cpu
